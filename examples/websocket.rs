//! A WebSocket to fal whose handshake carries the store's credential.
//!
//! ```text
//! cargo run --example websocket                                                       a fal in this process
//! cargo run --example websocket -- --live fal-ai/flux/schnell '{"prompt":"a cat"}'    the real one, which bills it
//! ```
//!
//! The first needs no network and no arguments. The second needs `FAL_KEY`, or `FAL_KEY_ID` and `FAL_KEY_SECRET`, or
//! `FAL_KEY_FILE`.
//!
//! `wss://ws.fal.run/{app}` is HTTP over a WebSocket: each message is the body of a request, and what comes back is a
//! `start`, the body of the response, and an `end`. The realtime protocol, `wss://fal.run/{app}/realtime`, differs in
//! its messages and not in its handshake.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::{env, error::Error, fs, path::Path, process::ExitCode, sync::Arc, time::Duration};

use futures_util::{SinkExt as _, StreamExt as _};
use http::{StatusCode, Uri};
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::{
    Connector, MaybeTlsStream, WebSocketStream, connect_async_tls_with_config,
    tungstenite::{self, Message, client::IntoClientRequest as _},
};
use tower_fal::{
    Credential, CredentialStore, FalAuthLayer,
    error::{BoxError, Classification, Reason, classify, report},
    mock::MockFal,
    origin::FalOrigins,
    source::{EnvSource, FileSource},
    store::Reloaded,
};

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let done = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] | ["--demo"] => demo().await,
        ["--live", app, input] => live(app, input).await,
        _ => Err("either nothing, or: --live fal-ai/flux/schnell '{\"prompt\":\"a cat\"}'".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", report(&*error));
            ExitCode::FAILURE
        }
    }
}

async fn live(app: &str, input: &str) -> Result<(), Box<dyn Error>> {
    let store = CredentialStore::builder(EnvSource::all()).build().await?;
    println!("credential: {:?} from {}", store.load().credential(), store.status().source);
    let fal = Fal { auth: FalAuthLayer::new(store.clone()), store, connector: connector()? };
    let mut socket = fal.connect(&format!("wss://ws.fal.run/{app}").parse()?).await?;
    ask(&mut socket, input).await
}

async fn demo() -> Result<(), Box<dyn Error>> {
    let [first, second] =
        [Credential::key("first-key:websocket-secret-1")?, Credential::key("second-key:websocket-secret-2")?];
    let mock = MockFal::start().await?;
    mock.accept(&first);
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("fal_key");
    write(&file, "first-key:websocket-secret-1\n")?;

    // Every 5 s unless told otherwise. Here only when a refusal has it look, for you to see that.
    let source = FileSource::new(&file).poll_every(Duration::from_secs(60 * 60));
    let store = CredentialStore::builder(source).build().await?;
    // The default admits `wss` to fal and nothing else; a mock speaks `ws`.
    let auth = FalAuthLayer::new(store.clone()).origins(FalOrigins::new().loopback_http());
    let fal = Fal { auth, store, connector: connector()? };
    let url = mock.ws_url("/fal-ai/flux/dev");

    println!("1  The file holds first-key, and fal knows it.");
    let mut socket = fal.connect(&url).await?;
    ask(&mut socket, r#"{"prompt":"a lighthouse"}"#).await?;

    println!("2  second-key is in the file, and first-key is revoked, before the store has looked again.");
    write(&file, "second-key:websocket-secret-2\n")?;
    mock.accept(&second);
    mock.revoke(&first);
    let mut socket = fal.connect(&url).await?;
    ask(&mut socket, r#"{"prompt":"a lighthouse at night"}"#).await?;

    println!("3  second-key is revoked, and the file has no other.");
    mock.revoke(&second);
    match fal.connect(&url).await {
        Err(NoSocket::Refused { status, said }) if said.reason == Reason::UnknownCredential => {
            println!("   refused with {status}: {:?} ({})\n", said.reason, said.detail.as_deref().unwrap_or_default());
        }
        other => return Err(format!("expected a refusal, and not {other:?}").into()),
    }

    println!("4  Another host gets no credential.");
    match fal.connect(&Uri::from_static("wss://ws.fal.run.example.com/fal-ai/flux/dev")).await {
        Err(NoSocket::NotAdmitted) => println!("   {}", NoSocket::NotAdmitted),
        other => return Err(format!("expected no connection, and not {other:?}").into()),
    }
    Ok(())
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// What a server keeps to open sockets with.
struct Fal {
    store: CredentialStore,
    auth: FalAuthLayer,
    connector: Connector,
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
enum NoSocket {
    #[error("the policy does not admit this URL, so nothing was sent there")]
    NotAdmitted,
    #[error("fal refused the handshake with {status}: {:?}", said.reason)]
    Refused { status: StatusCode, said: Classification },
    #[error("the handshake failed")]
    Failed(#[source] BoxError),
}

impl Fal {
    /// Opens a socket with the store's current credential, and once more if fal refuses it and there is a newer one.
    async fn connect(&self, url: &Uri) -> Result<Socket, NoSocket> {
        let mut again = false;
        loop {
            // Taken once and handed along, so that it is known for certain which one is refused.
            let sent = self.store.load();
            let mut handshake = url.into_client_request().map_err(|error| NoSocket::Failed(error.into()))?;
            handshake.extensions_mut().insert(sent.credential().clone());
            if !self.auth.authorize(&mut handshake) {
                return Err(NoSocket::NotAdmitted);
            }
            println!("   handshake with {:?}", sent.credential());
            let connector = Some(self.connector.clone());
            let response = match connect_async_tls_with_config(handshake, None, true, connector).await {
                Ok((socket, _)) => return Ok(socket),
                Err(tungstenite::Error::Http(response)) => response,
                Err(error) => return Err(NoSocket::Failed(error.into())),
            };
            // Of the body there is what came along with the head: mostly all of it, and the status is enough to go on.
            let (status, body) = (response.status(), response.body().as_deref().unwrap_or_default());
            let said = classify(status, response.headers(), body, Some(sent.credential()));
            // An application's own 401 is not about the key.
            let is_about_the_key = status == StatusCode::UNAUTHORIZED && said.reason != Reason::Application;
            if again || !is_about_the_key {
                return Err(NoSocket::Refused { status, said });
            }
            // Everybody who was refused waits for one look at the source. No newer one is no error of its own.
            let Ok(Reloaded::Changed(_)) = self.store.reload_past(sent.generation()).await else {
                return Err(NoSocket::Refused { status, said });
            };
            again = true;
        }
    }
}

/// rustls, with its provider named, so that it does not matter which others are compiled in. `ws` goes without.
fn connector() -> Result<Connector, rustls::Error> {
    let roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Connector::Rustls(Arc::new(config)))
}

/// Sends one request, and prints what comes as it comes.
async fn ask(socket: &mut Socket, input: &str) -> Result<(), Box<dyn Error>> {
    socket.send(Message::text(input)).await?;
    while let Some(message) = socket.next().await {
        match message? {
            Message::Text(text) => {
                println!("   {}", text.trim_end());
                // A message of fal's own, and not the application's: it says so by having both.
                let meta: Value = serde_json::from_str(&text).unwrap_or_default();
                if meta["type"] == "end" && meta["request_id"].is_string() {
                    println!();
                    return Ok(());
                }
            }
            Message::Binary(bytes) => println!("   {} bytes", bytes.len()),
            _ => {}
        }
    }
    Err("the socket was closed before the end of the answer".into())
}

/// A rename, so that nobody reads half a key.
fn write(file: &Path, key: &str) -> std::io::Result<()> {
    let new = file.with_extension("new");
    fs::write(&new, key)?;
    fs::rename(new, file)
}
