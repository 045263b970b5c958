//! The route that hands out tokens, as a browser sees it.

use std::sync::{Arc, Mutex};

use axum::{Router, response::IntoResponse as _, routing::MethodRouter};
use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode, header, request::Parts};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::{Value, json};
use tower::util::{MapRequestLayer, MapResponseLayer};
use tower_fal::{
    caller::{Caller, Refused, Tokens},
    mock::Presented,
    realtime::{MintError, TokenRoute, token_route},
};
use tower_http::cors::CorsLayer;

use crate::{
    support::key,
    world::{APP, Mints as _, World, opens, world},
};

/// A server with the route.
struct Server {
    url: String,
    client: Client<HttpConnector, Full<Bytes>>,
    task: tokio::task::JoinHandle<std::io::Result<()>>,
}

struct Answer {
    status: u16,
    headers: HeaderMap,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("{}", self.body))
    }

    /// The status and the rule of an answer of ours.
    fn rule(&self) -> (u16, String) {
        assert_eq!(self.headers["content-type"], "application/json");
        let body = self.json();
        assert_eq!(self.headers["x-tower-fal-rule"], body["rule"].as_str().unwrap());
        assert!(body["message"].is_string());
        (self.status, body["rule"].as_str().unwrap().to_owned())
    }
}

impl Server {
    async fn new(route: TokenRoute) -> Self {
        Self::of(route.into_route()).await
    }

    async fn of(route: MethodRouter) -> Self {
        let router = Router::new().route("/api/fal/token", route);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/api/fal/token", listener.local_addr().unwrap());
        let task = tokio::spawn(axum::serve(listener, router).into_future());
        Self { url, client: Client::builder(TokioExecutor::new()).build_http(), task }
    }

    async fn exchange(&self, method: &str, query: &str, headers: &[(&'static str, &str)]) -> Answer {
        let mut request = Request::builder().method(method).uri(format!("{}{query}", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let (head, body) = self.client.request(request.body(Full::default()).unwrap()).await.unwrap().into_parts();
        let body = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
        Answer { status: head.status.as_u16(), headers: head.headers, body }
    }

    async fn send(&self, method: &str, query: &str, headers: &[(&'static str, &str)]) -> Answer {
        let answer = self.exchange(method, query, headers).await;
        assert_eq!(answer.headers["cache-control"], "no-store", "{method} {query}");
        answer
    }

    async fn get(&self, query: &str, headers: &[(&'static str, &str)]) -> Answer {
        self.send("GET", query, headers).await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn route(world: &World) -> TokenRoute {
    token_route(world.minter().build().unwrap())
}

const QUERY: &str = "?app=acme%2Fcats%2Frealtime";

#[tokio::test]
async fn a_token_is_handed_out_with_its_advertised_life() {
    let world = world().await;
    let server = Server::new(route(&world).allow_anonymous()).await;
    let answer = server.get(QUERY, &[]).await;
    assert_eq!((answer.status, answer.headers["content-type"].to_str().unwrap()), (200, "application/json"));
    let token = answer.json()["token"].take();
    assert_eq!(answer.json(), json!({ "token": token, "expires_in": 120 }));
    assert!(opens(&world.fal, APP, token.as_str().unwrap()).await);
    let says_nothing = answer.headers.keys().all(|name| !name.as_str().starts_with("access-control-"));
    assert!(says_nothing, "{:?}", answer.headers);

    let text = server.get(QUERY, &[("accept", "text/plain")]).await;
    assert_eq!(text.headers["content-type"], "text/plain; charset=utf-8");
    assert_eq!(json!(text.body), token);
    assert_eq!(world.calls().len(), 1);
}

#[tokio::test]
async fn a_stream_has_tokens_too() {
    let world = world().await;
    let server = Server::new(route(&world).allow_anonymous()).await;
    let answer = server.get("?app=acme/cats/stream", &[]).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let token = answer.json()["token"].as_str().unwrap().to_owned();
    assert!(opens(&world.fal, "acme/cats/stream", &token).await);
}

#[tokio::test]
async fn it_is_closed_until_somebody_says_for_whom_it_is() {
    let world = world().await;
    let server = Server::new(route(&world)).await;
    assert_eq!(server.get(QUERY, &[]).await.rule(), (401, "caller".to_owned()));
    assert_eq!(world.fal.requests(), 0);
}

#[tokio::test]
async fn a_stranger_does_not_learn_which_applications_there_are() {
    let world = world().await;
    let tokens = Tokens::new([("token-of-ann", Caller::tenant("ann"))]);
    let server = Server::new(route(&world).authenticate(tokens)).await;
    for query in ["", "?app=other/cats/realtime", QUERY, "?app=a/../b"] {
        for headers in [&[][..], &[("authorization", "Bearer other")], &[("cookie", "token-of-ann")]] {
            let answer = server.get(query, headers).await;
            assert_eq!(answer.rule(), (401, "caller".to_owned()), "{query}");
        }
    }
    let ann = &[("authorization", "Bearer token-of-ann")];
    assert_eq!(server.get("?app=other/cats/realtime", ann).await.rule(), (403, "realtime".to_owned()));
    assert_eq!(world.fal.requests(), 0);
    assert_eq!(server.get(QUERY, ann).await.status, 200);
}

#[tokio::test]
async fn everybody_may_ask_by_a_name_of_this_machine_only() {
    let world = world().await;
    let server = Server::new(route(&world).allow_anonymous()).await;
    for host in ["evil.example", "127.0.0.1.evil.example", "[::2]"] {
        assert_eq!(server.get(QUERY, &[("host", host)]).await.rule(), (400, "host".to_owned()), "{host}");
    }
    assert_eq!(world.fal.requests(), 0);
    for host in ["localhost", "127.0.0.1:9", "[::1]"] {
        assert_eq!(server.get(QUERY, &[("host", host)]).await.status, 200, "{host}");
    }
    let named = Server::new(route(&world).allow_anonymous().allow_host("app.example").unwrap()).await;
    assert_eq!(named.get(QUERY, &[("host", "app.example")]).await.status, 200);
    let known = Server::new(route(&world).authenticate(async |_: &Parts| Ok(Caller::anonymous()))).await;
    assert_eq!(known.get(QUERY, &[("host", "app.example")]).await.status, 200);
}

#[tokio::test]
async fn a_query_names_one_application() {
    let world = world().await;
    let server = Server::new(route(&world).allow_anonymous()).await;
    for query in
        ["", "?", "?app", "?app=", "?app=cats", "?app=acme/cats&app=acme/cats", "?app=acme/%2e%2e/x", "?app=acme/a%3Fb"]
    {
        assert_eq!(server.get(query, &[]).await.rule(), (400, "app".to_owned()), "{query}");
    }
    for query in ["?app=acme/cats/other/realtime", "?app=other/cats", "?app=acme/realtime/realtime/realtime"] {
        assert_eq!(server.get(query, &[]).await.rule(), (403, "realtime".to_owned()), "{query}");
    }
    assert_eq!(world.fal.requests(), 0);
}

#[tokio::test]
async fn other_methods_get_no_token() {
    let world = world().await;
    let server = Server::new(route(&world).allow_anonymous()).await;
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"] {
        let answer = server.send(method, QUERY, &[("origin", "https://evil.example")]).await;
        assert_eq!((answer.status, answer.body.as_str()), (405, ""), "{method}");
    }
    assert_eq!(world.fal.requests(), 0);
}

/// A browser asks without the caller's token whether it may ask with it.
#[tokio::test]
async fn pages_of_other_origins_may_ask_if_a_layer_says_so() {
    let world = world().await;
    let tokens = Tokens::new([("token-of-ann", Caller::tenant("ann"))]);
    let page = "https://app.example";
    let cors = CorsLayer::new().allow_origin([page.parse().unwrap()]).allow_headers([header::AUTHORIZATION]);
    let server = Server::of(route(&world).authenticate(tokens).into_route().layer(cors)).await;
    let asks = [("origin", page), ("access-control-request-method", "GET")];
    let preflight = server.exchange("OPTIONS", QUERY, &asks).await;
    assert_eq!((preflight.status, preflight.headers["access-control-allow-origin"].to_str().unwrap()), (200, page));
    let answer = server.get(QUERY, &[("origin", page), ("authorization", "Bearer token-of-ann")]).await;
    assert_eq!((answer.status, answer.headers["access-control-allow-origin"].to_str().unwrap()), (200, page));
    assert_eq!(server.get(QUERY, &[("origin", page)]).await.status, 401);
}

#[tokio::test]
async fn a_failure_of_fal_is_a_503_that_says_little() {
    let world = world().await;
    let errors = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&errors);
    let note = MapResponseLayer::new(move |response: axum::response::Response| {
        seen.lock().unwrap().extend(response.extensions().get::<MintError>().cloned());
        response
    });
    let server = Server::new(route(&world).layer(note).allow_anonymous()).await;
    world.fal.deny(&key(1));
    let answer = server.get(QUERY, &[]).await;
    assert_eq!(answer.rule(), (503, "no_token".to_owned()));
    assert_eq!(answer.headers["retry-after"], "1");
    assert!(!answer.body.contains("id-1") && !answer.body.contains("permission"), "{}", answer.body);
    // Those who run the server have it all.
    assert!(errors.lock().unwrap()[0].auth_error().is_some());
}

#[tokio::test]
async fn a_layer_in_front_of_the_token_sees_the_caller() {
    let world = world().await;
    let names = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&names);
    let note = MapRequestLayer::new(move |request: axum::extract::Request| {
        let name = request.extensions().get::<Caller>().and_then(Caller::name).map(str::to_owned);
        seen.lock().unwrap().push(name);
        request
    });
    let tokens = Tokens::new([("token-of-ann", Caller::tenant("ann"))]);
    let server = Server::new(route(&world).authenticate(tokens).layer(note)).await;
    assert_eq!(server.get(QUERY, &[("authorization", "Key token-of-ann")]).await.status, 200);
    assert_eq!(server.get(QUERY, &[]).await.status, 401);
    assert_eq!(*names.lock().unwrap(), [Some("ann".to_owned())]);
}

#[tokio::test]
async fn a_caller_has_endpoints_and_a_credential_of_his_own() {
    let world = world().await;
    world.fal.accept(&key(7));
    let authenticate = async |head: &Parts| -> Result<Caller, Refused> {
        match head.headers.get(header::AUTHORIZATION).map(|value| value.as_bytes()) {
            Some(b"cats") => Ok(Caller::tenant("cats").endpoints(["acme/cats"]).unwrap()),
            Some(b"pays") => Ok(Caller::tenant("pays").credential(key(7))),
            _ => Err(StatusCode::IM_A_TEAPOT.into_response()),
        }
    };
    let server = Server::new(route(&world).authenticate(authenticate)).await;
    assert_eq!(server.get(QUERY, &[]).await.status, 418);
    let cats = &[("authorization", "cats")];
    assert_eq!(server.get(QUERY, cats).await.status, 200);
    assert_eq!(server.get("?app=acme/dogs/realtime", cats).await.rule(), (403, "realtime".to_owned()));
    let own = server.get(QUERY, &[("authorization", "pays")]).await;
    assert_eq!(own.status, 200);
    let last = world.calls().pop().unwrap();
    assert_eq!(last.presented, Presented::Accepted(key(7).key_id().cloned()));

    // A credential of his own that is refused is never replaced by the house's.
    world.fal.revoke(&key(7));
    assert_eq!(server.get(QUERY, &[("authorization", "pays")]).await.rule(), (503, "no_token".to_owned()));
    let last = world.calls().pop().unwrap();
    assert_eq!(last.presented, Presented::Refused(key(7).key_id().cloned()));
}
