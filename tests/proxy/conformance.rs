//! The table `tests/cases/proxy/conformance.json`: what the proxy does with each input, beside what fal's JavaScript package
//! does. A row is added there, and nothing here.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;
use tower_fal::{
    caller::{Caller, Tokens},
    proxy::{FalProxy, RequestOwnersInMemory},
};

use crate::support::{Answer, Raw, RawFal, SECRET, Server, Upstream, client, proxy};

const TABLE: &str = include_str!("../cases/proxy/conformance.json");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    id: String,
    what: String,
    /// In the place of all that follows.
    raw: Option<String>,
    #[serde(default = "Row::method")]
    method: String,
    target: Option<String>,
    /// A target of so many bytes.
    target_of: Option<usize>,
    #[serde(default = "Row::host")]
    host: String,
    #[serde(default)]
    lines: Vec<String>,
    #[serde(default = "Row::content_type")]
    content_type: Option<String>,
    body: Option<String>,
    /// What fal answers.
    answer: Option<Vec<String>>,
    #[serde(default)]
    options: BTreeMap<String, Vec<String>>,
    expect: Expect,
    /// `@fal-ai/server-proxy` 1.2.1.
    javascript: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expect {
    #[serde(default = "Expect::status")]
    status: u16,
    rule: Option<String>,
    /// The method and the path that fal gets. `None` if fal gets nothing, unless `status` is 200.
    sent: Option<String>,
    host: Option<String>,
    body: Option<String>,
    #[serde(default)]
    sent_has: Vec<String>,
    #[serde(default)]
    sent_lacks: Vec<String>,
    #[serde(default)]
    has: Vec<String>,
    #[serde(default)]
    lacks: Vec<String>,
    ends: Option<String>,
    requests: Option<usize>,
}

impl Row {
    fn method() -> String {
        "POST".to_owned()
    }

    fn host() -> String {
        "localhost".to_owned()
    }

    #[allow(clippy::unnecessary_wraps)] // as serde wants it
    fn content_type() -> Option<String> {
        Some("application/json".to_owned())
    }

    fn bytes(&self) -> Vec<u8> {
        if let Some(raw) = &self.raw {
            return raw.clone().into_bytes();
        }
        let long =
            self.target_of.map(|length| format!("https://fal.run/{}", "a".repeat(length - "https://fal.run/".len())));
        let raw = Raw {
            method: &self.method,
            host: &self.host,
            content_type: self.content_type.as_deref(),
            lines: self.lines.clone(),
            body: self.body.as_deref().unwrap_or(if self.method == "POST" { "{}" } else { "" }),
            ..Raw::post("")
        };
        Raw { target: self.target.as_deref().or(long.as_deref()), ..raw }.bytes()
    }

    fn proxy(&self, fal: std::net::SocketAddr) -> FalProxy<Upstream> {
        let mut made = proxy(fal);
        for (option, values) in &self.options {
            made = match &**option {
                "targets" => made.targets(values).unwrap(),
                "allow_target" => values.iter().fold(made, |made, value| made.allow_target(value).unwrap()),
                "allow_endpoint" => values.iter().fold(made, |made, value| made.allow_endpoint(value).unwrap()),
                "allow_webhook" => values.iter().fold(made, |made, value| made.allow_webhook(value).unwrap()),
                "max_body" => made.max_body(values[0].parse().unwrap()),
                "request_owners" => made.request_owners(RequestOwnersInMemory::default()),
                "callers" if values == &["nobody"] => FalProxy::over(&crate::support::store(), client(fal)),
                "callers" if values == &["tokens"] => {
                    made.authenticate(Tokens::new([("token-of-acme", Caller::tenant("acme"))]))
                }
                "credential" => FalProxy::per_request(client(fal)).allow_anonymous(),
                other => panic!("{}: there is no option {other}", self.id),
            };
        }
        made
    }
}

impl Expect {
    fn status() -> u16 {
        200
    }
}

fn rows() -> Vec<Row> {
    serde_json::from_str(TABLE).unwrap()
}

/// What is wrong with the outcome of a row.
async fn check(row: &Row) -> Result<(), String> {
    let fal = match &row.answer {
        Some(lines) => RawFal::new(lines.join("\r\n")).await,
        None => RawFal::ok().await,
    };
    let server = Server::new(row.proxy(fal.address).into_router()).await;
    let text = server.raw(&row.bytes()).await;
    let (answer, sent) = (Answer::parse(&text), fal.sent());
    let wrong = |what: &str| Err(format!("{} ({}): {what}\n{answer:?}\n{sent:?}", row.id, row.what));

    let expect = &row.expect;
    if answer.status != expect.status || answer.rule() != expect.rule.as_deref() {
        return wrong("another status or rule");
    }
    if text.contains(SECRET) {
        return wrong("the answer holds the secret");
    }
    for part in &expect.has {
        if !answer.head.contains(&part.to_ascii_lowercase()) {
            return wrong(&format!("the answer lacks {part}"));
        }
    }
    for part in &expect.lacks {
        if text.contains(part) {
            return wrong(&format!("the answer has {part}"));
        }
    }
    if expect.ends.as_ref().is_some_and(|end| !answer.body.ends_with(end)) {
        return wrong("another body");
    }
    if let Some(rule) = &expect.rule
        && row.method != "HEAD"
    {
        let body: Value = serde_json::from_str(&answer.body).map_err(|_| format!("{}: no JSON", row.id))?;
        if body["rule"] != **rule
            || !body["message"].is_string()
            || answer.header("content-type") != Some("application/json")
        {
            return wrong("an answer that the official client cannot show");
        }
    }

    let is_ours = expect.rule.is_some() || expect.status == 400;
    if sent.len() != expect.requests.unwrap_or(usize::from(!is_ours)) {
        return wrong("another number of requests to fal");
    }
    let Some(sent) = sent.first() else { return Ok(()) };
    if expect.sent.as_ref().is_some_and(|line| !sent.head.starts_with(&format!("{line} HTTP/1.1\r\n"))) {
        return wrong("another request line");
    }
    if expect.host.as_ref().is_some_and(|host| sent.host() != host) {
        return wrong("another host");
    }
    if expect.body.as_ref().is_some_and(|body| sent.body != body.as_bytes()) {
        return wrong("another body was sent");
    }
    for part in &expect.sent_has {
        if !sent.head.contains(part) {
            return wrong(&format!("the request lacks {part}"));
        }
    }
    for part in &expect.sent_lacks {
        if sent.head.contains(part) {
            return wrong(&format!("the request has {part}"));
        }
    }
    Ok(())
}

#[tokio::test]
async fn each_row_of_the_table_holds() {
    let mut wrong = Vec::new();
    for row in rows() {
        wrong.extend(check(&row).await.err());
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn each_row_has_an_id_of_its_own_and_the_answer_of_the_package() {
    let rows = rows();
    let mut ids: Vec<_> = rows.iter().map(|row| &row.id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), rows.len());
    assert!(rows.iter().all(|row| !row.javascript.is_empty()));
}

/// The manual compares the proxy with the package, by rows of this table.
#[test]
fn each_row_that_the_manual_names_is_there() {
    let (manual, rows) = (include_str!("../../docs/proxy.md"), rows());
    let table = manual.split("# Compared").nth(1).unwrap();
    let named = table.lines().filter_map(|line| line.strip_suffix(" |")?.rsplit_once("| ")).map(|(_, id)| id);
    let named: Vec<_> = named.filter(|id| id.starts_with(|first: char| first.is_ascii_uppercase())).collect();
    assert!(named.len() > 20, "{named:?}");
    for id in named {
        assert!(rows.iter().any(|row| row.id == id), "{id}");
    }
}
