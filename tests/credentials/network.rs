//! The network that a program sees: a proxy, behind which are fal's own hosts, with a certificate of ours. It answers
//! what a case says, and keeps what was not expected.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use rcgen::CertifiedKey;
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

/// The hosts that a program of fal's may call.
const HOSTS: [&str; 6] =
    ["rest.alpha.fal.ai", "rest.fal.ai", "auth.fal.ai", "fal.run", "queue.fal.run", "elsewhere.test"];

/// A request that is expected, and its answer.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Exchange {
    /// Such as `GET https://rest.alpha.fal.ai/users/current`.
    request: String,
    /// The values of headers; `null` for one that must not be there.
    #[serde(default)]
    headers: BTreeMap<String, Option<String>>,
    /// The fields of its form, all of them.
    form: Option<BTreeMap<String, String>>,
    status: u16,
    #[serde(default)]
    answer_headers: BTreeMap<String, String>,
    /// A text, or JSON.
    answer: Value,
}

pub(crate) struct Network {
    pub(crate) address: SocketAddr,
    /// What a program that trusts this network reads as its roots.
    pub(crate) certificate: String,
    seen: Arc<Seen>,
    // Ends with this.
    _accepting: JoinSet<()>,
}

struct Seen {
    expected: Mutex<std::vec::IntoIter<Exchange>>,
    surprises: Mutex<Vec<String>>,
}

impl Network {
    pub(crate) async fn start(expected: Vec<Exchange>) -> Self {
        let CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(HOSTS.map(str::to_owned)).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)
            .unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let expected = Mutex::new(expected.into_iter());
        let seen = Arc::new(Seen { expected, surprises: Mutex::default() });
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, TlsAcceptor::from(Arc::new(config)), Arc::clone(&seen)));
        Self { address, certificate: cert.pem(), seen, _accepting: accepting }
    }

    /// What came and was not expected, and what was expected and did not come.
    pub(crate) fn surprises(&self) -> Vec<String> {
        let mut surprises = self.seen.surprises.lock().unwrap().clone();
        let left = self.seen.expected.lock().unwrap();
        surprises.extend(left.as_slice().iter().map(|exchange| format!("there was no {}", exchange.request)));
        surprises
    }
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, seen: Arc<Seen>) {
    let mut connections = JoinSet::new();
    while let Ok((socket, _)) = listener.accept().await {
        let (tls, seen) = (tls.clone(), Arc::clone(&seen));
        connections.spawn(proxy(socket, tls, seen));
    }
}

/// Serves one connection to the proxy, which is all of fal's hosts at once, and this machine for a request in clear.
async fn proxy(socket: TcpStream, tls: TlsAcceptor, seen: Arc<Seen>) {
    let tunnels = Arc::new(tokio::sync::Mutex::new(JoinSet::new()));
    let service = service_fn(|mut request: Request<Incoming>| {
        let (seen, tls, tunnels) = (Arc::clone(&seen), tls.clone(), Arc::clone(&tunnels));
        async move {
            if request.method() != Method::CONNECT {
                return Ok::<_, Infallible>(seen.answer("http", request).await);
            }
            let upgrade = hyper::upgrade::on(&mut request);
            tunnels.lock().await.spawn(tunnel(upgrade, tls, seen));
            Ok(Response::new(Full::default()))
        }
    });
    let _ = http1::Builder::new().serve_connection(TokioIo::new(socket), service).with_upgrades().await;
    while tunnels.lock().await.join_next().await.is_some() {}
}

async fn tunnel(upgrade: OnUpgrade, tls: TlsAcceptor, seen: Arc<Seen>) {
    let Ok(socket) = upgrade.await else { return };
    let Ok(socket) = tls.accept(TokioIo::new(socket)).await else { return };
    let service = service_fn(|request: Request<Incoming>| {
        let seen = Arc::clone(&seen);
        async move { Ok::<_, Infallible>(seen.answer("https", request).await) }
    });
    let _ = http1::Builder::new().serve_connection(TokioIo::new(socket), service).await;
}

impl Seen {
    async fn answer(&self, scheme: &str, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let host = request.headers().get("host").map_or("", |host| host.to_str().unwrap()).to_owned();
        let (head, body) = request.into_parts();
        let line = format!("{} {scheme}://{host}{}", head.method, head.uri.path());
        let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        let next = self.expected.lock().unwrap().next();
        let Some(expected) = next else {
            return self.surprise(format!("{line} was not expected"));
        };
        // A loopback address is another one each time.
        if line.replace(&host, "{network}") != expected.request && line != expected.request {
            return self.surprise(format!("{line} came in place of {}", expected.request));
        }
        for (name, value) in &expected.headers {
            let came = head.headers.get(name).map(|value| value.to_str().unwrap().to_owned());
            if came != *value {
                return self.surprise(format!("{line} had the wrong {name}"));
            }
        }
        let form = url::form_urlencoded::parse(&body).into_owned().collect();
        if expected.form.is_some_and(|expected| expected != form) {
            return self.surprise(format!("{line} had the wrong form"));
        }
        let answer = match expected.answer {
            Value::String(text) => text,
            json => json.to_string(),
        };
        let mut response = Response::builder().status(expected.status);
        for (name, value) in expected.answer_headers {
            response = response.header(name, value);
        }
        response.body(Full::from(answer)).unwrap()
    }

    fn surprise(&self, text: String) -> Response<Full<Bytes>> {
        self.surprises.lock().unwrap().push(text);
        Response::builder().status(StatusCode::IM_A_TEAPOT).body(Full::default()).unwrap()
    }
}
