//! `examples/axum_proxy`: an app with routes of its own, and the proxy beside them.

use std::process::Stdio;

use http::{Method, Request};
use http_body_util::Full;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::io::{AsyncBufReadExt as _, BufReader};

use crate::app::{Answer, app};

#[tokio::test]
async fn the_apps_own_routes_and_the_proxy_are_side_by_side() {
    let mut command = app("axum_proxy");
    command.args(["--demo", "--listen", "127.0.0.1:0"]).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).await.unwrap();
    let url = line.trim_end().strip_prefix("listening on ").unwrap();
    let client = Client::builder(TokioExecutor::new()).build_http();
    let send = async |method, path: &str, headers: &[(&'static str, &str)]| {
        let mut request = Request::new(Full::<bytes::Bytes>::from(if method == Method::POST { "{}" } else { "" }));
        *request.uri_mut() = format!("{url}{path}").parse().unwrap();
        *request.method_mut() = method;
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        Answer::of(client.request(request).await.unwrap()).await
    };
    assert_eq!(send(Method::GET, "/", &[]).await.body, "a page of your own\n");
    let json = ("content-type", "application/json");
    let target = |url| ("x-fal-target-url", url);
    for (status, rule, headers) in [
        (200, None, &[json, target("https://fal.run/fal-ai/flux/dev")][..]),
        (200, None, &[json, target("https://queue.fal.run/fal-ai/flux/dev")]),
        (403, Some("endpoint"), &[json, target("https://fal.run/fal-ai/other")]),
        (412, Some("target"), &[json, target("https://fal.example/fal-ai/flux/dev")]),
        (400, Some("target_missing"), &[json]),
        // As of a page that has led its own name to this machine.
        (400, Some("host"), &[json, target("https://fal.run/fal-ai/flux/dev"), ("host", "evil.example")]),
    ] {
        let answer = send(Method::POST, "/api/fal/proxy", headers).await;
        let by = answer.headers.get("x-tower-fal-rule").map(|rule| rule.to_str().unwrap());
        assert_eq!((answer.status.as_u16(), by), (status, rule), "{headers:?}: {}", answer.body);
        assert!(!answer.body.contains("not-a-secret"), "{}", answer.body);
    }
    child.kill().await.unwrap();
}
