//! `examples/mock_fal`, as a program in another language sees it.

use std::{net::SocketAddr, path::PathBuf, process::Stdio, sync::Arc};

use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri, Version, header};
use http_body_util::{BodyExt as _, Full};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{
    client::legacy::{Client, connect::Connect},
    rt::TokioExecutor,
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

use crate::support::example;

/// The mock as a process, which ends with this.
pub(crate) struct MockProcess {
    child: Child,
    /// Such as `https://127.0.0.1:8443`.
    pub(crate) fal: String,
    control: String,
    directory: TempDir,
}

impl MockProcess {
    /// Returns once it listens, with one valid key.
    pub(crate) async fn start(key: &str, tls: bool) -> Self {
        Self::start_with(&["--key", key], tls).await
    }

    async fn start_with(arguments: &[&str], tls: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut command = example("mock_fal");
        command.args(arguments);
        if tls {
            command.arg("--tls").arg("--ca-out").arg(directory.path().join("ca.pem"));
        }
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).await.unwrap();
        let (fal, control) = line.trim_end().strip_prefix("fal on ").unwrap().split_once(", control on ").unwrap();
        Self { child, fal: fal.to_owned(), control: control.to_owned(), directory }
    }

    /// The certificate of its CA.
    pub(crate) fn ca(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    pub(crate) async fn tell(&self, path: &str, body: &Value) -> StatusCode {
        self.control(Method::POST, path, body.to_string()).await.0
    }

    pub(crate) async fn received(&self) -> Value {
        serde_json::from_str(&self.control(Method::GET, "/received", String::new()).await.1).unwrap()
    }

    async fn control(&self, method: Method, path: &str, body: String) -> (StatusCode, String) {
        self.control_with(method, path, body, &[("content-type", "application/json")]).await
    }

    async fn control_with(
        &self,
        method: Method,
        path: &str,
        body: impl Into<Bytes>,
        headers: &[(&'static str, &str)],
    ) -> (StatusCode, String) {
        let client = Client::builder(TokioExecutor::new()).build_http();
        let mut request = Request::new(Full::new(body.into()));
        *request.method_mut() = method;
        *request.uri_mut() = format!("{}{path}", self.control).parse().unwrap();
        for &(name, value) in headers {
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        answer(client.request(request).await.unwrap()).await
    }

    /// Sends a signal, and waits for the exit code.
    async fn end(mut self, signal: &str) -> Option<i32> {
        let kill = format!("kill -{signal} {}", self.child.id().unwrap());
        assert!(Command::new("sh").args(["-c", &kill]).status().await.unwrap().success());
        self.child.wait().await.unwrap().code()
    }
}

/// TLS that trusts the CA of this mock and no other.
fn trusting(mock: &MockProcess) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(mock.ca()).unwrap()).unwrap();
    ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

async fn answer(response: http::Response<hyper::body::Incoming>) -> (StatusCode, String) {
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

async fn post(client: &Client<impl Connect + Clone + Send + Sync + 'static, Full<&'static [u8]>>, url: &str) -> Value {
    let request = Request::post(url).header(header::AUTHORIZATION, "Key my-key:not-a-secret").body(Full::default());
    let (status, body) = answer(client.request(request.unwrap()).await.unwrap()).await;
    let body: Value = serde_json::from_str(&body).unwrap();
    json!([status.as_u16(), body])
}

#[tokio::test]
async fn the_control_endpoint_accepts_revokes_and_locks() {
    let mock = MockProcess::start("my-key:not-a-secret", false).await;
    let client = Client::builder(TokioExecutor::new()).build_http();
    let run = format!("{}/run/a/b", mock.fal);
    let key = json!({"key": "my-key:not-a-secret"});
    assert_eq!(post(&client, &run).await[0], 200);
    assert_eq!(mock.tell("/revoke", &key).await, 200);
    assert_eq!(post(&client, &run).await, json!([401, {"detail": "invalid key credentials"}]));
    assert_eq!(mock.tell("/accept", &key).await, 200);
    assert_eq!(mock.tell("/lock", &json!({"reason": "TOP_UP"})).await, 200);
    assert_eq!(post(&client, &run).await, json!([403, {"detail": "User is locked. Reason: TOP_UP."}]));
    assert_eq!(mock.tell("/unlock", &json!(null)).await, 200);
    assert_eq!(post(&client, &run).await[0], 200);

    let received = mock.received().await;
    assert_eq!(received["runs"], 2);
    let seen = |n: usize| [&received["requests"][n]["presented"], &received["requests"][n]["status"]];
    assert_eq!(seen(0), [&json!("accepted"), &json!(200)]);
    assert_eq!(seen(1), [&json!("refused"), &json!(401)]);
    assert_eq!(seen(2), [&json!("accepted"), &json!(403)]);
    let expected = json!({
        "method": "POST", "host": mock.fal.strip_prefix("http://").unwrap(), "path": "/run/a/b",
        "presented": "accepted", "key_id": "my-key", "status": 200,
    });
    assert_eq!(received["requests"][3], expected);
    assert!(!received.to_string().contains("not-a-secret"));
}

#[tokio::test]
async fn an_app_answers_and_fails_as_the_control_endpoint_says() {
    let mock = MockProcess::start_with(&["--key=my-key:not-a-secret", "--keep-content"], false).await;
    let client = Client::builder(TokioExecutor::new()).build_http();
    let url = |path: &str| format!("{}/run/{path}", mock.fal);
    let told = json!({"app": "a/b", "status": 401, "body": {"detail": "mine"}, "runner": false});
    assert_eq!(mock.tell("/answer", &told).await, 200);
    assert_eq!(post(&client, &url("a/b?x=1")).await, json!([401, {"detail": "mine"}]));
    assert_eq!(mock.tell("/answer", &json!({"app": "a/b", "body": [1]})).await, 200);
    assert_eq!(post(&client, &url("a/b")).await, json!([200, [1]]));
    assert_eq!(mock.tell("/answer", &json!({"app": "a/b"})).await, 200);
    assert_eq!(post(&client, &url("a/b")).await[1]["path"], "/a/b");

    assert_eq!(mock.tell("/fail", &json!({"path": "a/b", "status": 503})).await, 200);
    assert_eq!(post(&client, &url("a/c")).await[0], 200);
    assert_eq!(post(&client, &url("a/b")).await[0], 503);
    assert_eq!(mock.tell("/fail", &json!({"n": 2, "status": 502})).await, 200);
    assert_eq!(post(&client, &url("a/c")).await[0], 502);

    let received = mock.received().await;
    let first = &received["requests"][0];
    assert_eq!((&first["query"], &first["body"]), (&json!("x=1"), &json!("")));
    assert_eq!(first["headers"]["host"], mock.fal.strip_prefix("http://").unwrap());
    assert!(!received.to_string().contains("not-a-secret"));
}

#[tokio::test]
async fn a_web_page_cannot_use_the_control_endpoint() {
    let mock = MockProcess::start("my-key:not-a-secret", false).await;
    let json = ("content-type", "application/json");
    let key = r#"{"key":"evil:evil"}"#;
    for (expected, headers) in [
        (403, vec![json, ("origin", "https://evil.example")]),
        (403, vec![json, ("origin", "null")]),
        (403, vec![json, ("origin", &mock.control)]),
        (421, vec![json, ("host", "evil.example")]),
        (421, vec![json, ("host", "localhost.evil.example:80")]),
        (421, vec![json, ("host", "127.0.0.1.evil.example")]),
        (421, vec![json, ("host", "")]),
        (415, vec![]),
        (415, vec![("content-type", "text/plain")]),
        (415, vec![("content-type", "application/x-www-form-urlencoded")]),
        (415, vec![("content-type", "text/plain; application/json")]),
    ] {
        for (path, body) in [("/accept", key), ("/revoke", key), ("/lock", r#"{"reason":"TOP_UP"}"#)] {
            let (status, text) = mock.control_with(Method::POST, path, body, &headers).await;
            assert_eq!(status, expected, "{path} {headers:?}: {text}");
        }
        if expected != 415 {
            assert_eq!(mock.control_with(Method::POST, "/lock", "", &headers).await.0, expected);
            assert_eq!(mock.control_with(Method::GET, "/received", "", &headers).await.0, expected);
        }
    }
    let client = Client::builder(TokioExecutor::new()).build_http();
    assert_eq!(post(&client, &format!("{}/run/a/b", mock.fal)).await[0], 200);

    for headers in [
        vec![json, ("host", "LOCALHOST:1")],
        vec![json, ("host", "[::1]:1")],
        vec![("content-type", "application/json; charset=utf-8")],
    ] {
        assert_eq!(mock.control_with(Method::POST, "/accept", key, &headers).await.0, 200, "{headers:?}");
    }
    assert_eq!(mock.control_with(Method::POST, "/lock", "", &[]).await.0, 200);
}

#[tokio::test]
async fn a_wrong_control_request_is_refused_and_not_repeated() {
    let mock = MockProcess::start("my-key:not-a-secret", false).await;
    for (path, body) in [
        ("/accept", r#"{"key":"hush"}"#),
        ("/accept", r#""hush:hush""#),
        ("/revoke", "hush:hush"),
        ("/revoke", ""),
        ("/lock", r#"{"reason":"hush"}"#),
        ("/lock", "hush"),
        ("/answer", r#"{"hush":1}"#),
        ("/answer", r#"{"app":"a/b","body":1,"status":100}"#),
        ("/answer", r#"{"app":"a/b","body":1,"status":1000}"#),
        ("/fail", r#"{"path":"hush"}"#),
        ("/fail", r#"{"status":101}"#),
    ] {
        let (status, text) = mock.control(Method::POST, path, body.to_owned()).await;
        assert_eq!(status, 400, "{path} {body}");
        assert!(!text.is_empty() && !text.contains("hush"), "{text}");
    }
    assert_eq!(mock.received().await, json!({"runs": 0, "requests": []}));
}

#[tokio::test]
async fn its_certificate_is_valid_for_loopback_and_fals_names() {
    let mock = MockProcess::start("my-key:not-a-secret", true).await;
    let config = trusting(&mock);
    let port = mock.fal.parse::<Uri>().unwrap().port_u16().unwrap();
    for host in ["127.0.0.1", "localhost"] {
        for version in [Version::HTTP_11, Version::HTTP_2] {
            let connector = HttpsConnectorBuilder::new().with_tls_config(config.clone()).https_only();
            let connector = match version {
                Version::HTTP_11 => connector.enable_http1().build(),
                _ => connector.enable_http2().build(),
            };
            let client = Client::builder(TokioExecutor::new()).http2_only(version == Version::HTTP_2).build(connector);
            let job = post(&client, &format!("https://{host}:{port}/queue/a/b")).await;
            let url = job[1]["status_url"].as_str().unwrap();
            assert!(url.starts_with(&format!("https://{host}:{port}/queue/a/b/requests/")), "{url}");
        }
    }
    for name in ["fal.run", "queue.fal.run", "rest.fal.ai", "api.fal.ai", "v3.fal.media"] {
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(config.clone())
            .https_only()
            .with_server_name_resolver(hyper_rustls::FixedServerNameResolver::new(name.try_into().unwrap()))
            .enable_http1()
            .build();
        let client = Client::builder(TokioExecutor::new()).build(connector);
        assert_eq!(post(&client, &format!("{}/run/a/b", mock.fal)).await[0], 200, "{name}");
    }
}

#[tokio::test]
async fn a_signal_ends_it_while_a_connection_is_open() {
    for signal in ["TERM", "INT"] {
        let mock = MockProcess::start("my-key:not-a-secret", false).await;
        let address = mock.fal.strip_prefix("http://").unwrap().to_owned();
        let _open = tokio::net::TcpStream::connect(address).await.unwrap();
        assert_eq!(mock.end(signal).await, Some(0), "{signal}");
    }
}

#[tokio::test]
async fn wrong_arguments_end_it_with_2_and_one_line() {
    for arguments in [
        vec!["hush:hush"],
        vec!["--hush"],
        vec!["--key", "hush"],
        vec!["--key=hush"],
        vec!["--listen", "hush"],
        vec!["--listen=hush"],
        vec!["--key"],
        vec!["--tls"],
        vec!["--ca-out", "ca.pem"],
    ] {
        let output = example("mock_fal").args(&arguments).output().await.unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{told}");
        let is_one_line = told.ends_with(" See --help.\n") && told.matches('\n').count() == 1;
        assert!(is_one_line && !told.contains("hush"), "{told}");
    }
    let help = example("mock_fal").arg("--help").output().await.unwrap();
    assert!(help.status.success() && help.stdout.starts_with(b"A fal on this machine"));
}

#[tokio::test]
async fn an_address_that_is_taken_is_named() {
    let mock = MockProcess::start("my-key:not-a-secret", true).await;
    let ca = std::fs::read(mock.ca()).unwrap();
    let address = mock.fal.strip_prefix("https://").unwrap();
    let control = mock.control.strip_prefix("http://").unwrap();
    for (option, taken) in [("--listen", address), ("--control", control)] {
        let mut second = example("mock_fal");
        let output = second.args([option, taken, "--tls", "--ca-out"]).arg(mock.ca()).output().await.unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.starts_with(&format!("cannot listen on {taken}: ")), "{told}");
        assert!(told.ends_with(&format!(" Choose another address with {option}.\n")), "{told}");
        assert!(output.stdout.is_empty());
    }
    // The file still has the CA of the process that uses the address.
    assert_eq!(std::fs::read(mock.ca()).unwrap(), ca);
}

#[tokio::test]
async fn reqwest_finds_it_under_fals_own_names() {
    let mock = MockProcess::start("my-key:not-a-secret", true).await;
    let address: SocketAddr = mock.fal.strip_prefix("https://").unwrap().parse().unwrap();
    let client = reqwest::Client::builder()
        .no_proxy()
        .resolve("fal.run", address)
        .resolve("queue.fal.run", address)
        .tls_backend_preconfigured(trusting(&mock))
        .build()
        .unwrap();
    let send = async |url: &str| {
        let response = client.post(url).header("authorization", "Key my-key:not-a-secret").body("{}").send();
        response.await.unwrap().json::<Value>().await.unwrap()
    };
    assert_eq!(send("https://fal.run/a/b").await["path"], "/a/b");
    let job = send("https://queue.fal.run/a/b").await;
    assert!(job["status_url"].as_str().unwrap().starts_with("https://queue.fal.run/a/b/requests/"), "{job}");
    assert_eq!(mock.received().await["requests"][0]["host"], "fal.run");
}
