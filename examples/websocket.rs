//! A WebSocket to fal whose handshake carries the store's credential.
//!
//! ```text
//! cargo run --example websocket                                                       a fal in this process
//! cargo run --example websocket -- --live fal-ai/flux/schnell '{"prompt":"a cat"}'    the real one, which bills it
//! ```
//!
//! The first command needs no key, no network and no arguments. The second command needs `FAL_KEY`, or `FAL_KEY_ID` and
//! `FAL_KEY_SECRET`, or `FAL_KEY_FILE`.
//!
//! `wss://ws.fal.run/{app}` is HTTP over a WebSocket: each message is the body of a request, and the answer is a
//! `start`, the body of the response, and an `end`. The realtime protocol, `wss://fal.run/{app}/realtime`, has other
//! messages and the same handshake.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::{
    convert::Infallible,
    fs,
    path::Path,
    pin::Pin,
    process::ExitCode,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use clap::Parser;
use futures_util::{SinkExt as _, StreamExt as _};
use http::{Request, Response, Uri};
use http_body::{Body, Frame};
use http_body_util::{Empty, Full};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::{
    Connector, MaybeTlsStream, WebSocketStream, connect_async_tls_with_config,
    tungstenite::{self, Message, client::IntoClientRequest as _},
};
use tower::{Layer as _, ServiceExt as _, service_fn};
use tower_fal::{
    Credential, CredentialStore, FalAuthError, FalAuthLayer, FalLayer, error::BoxError, mock::MockFal,
    origin::FalOrigins, retry::ReplayBody, source::FileSource,
};

use self::{
    demo::{Live, Target},
    terminal::Printable,
};

mod demo;
mod terminal;

/// Opens WebSockets to fal, whose handshakes carry a store's credential.
#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    target: Target,
}

#[tokio::main]
async fn main() -> ExitCode {
    terminal::run(async |arguments: Arguments| match arguments.target.live().await? {
        None => demonstrate().await,
        Some(Live { store, app, input }) => {
            let origins = FalOrigins::only(["ws.fal.run"])?.handshakes();
            let layer = tower_fal::layer(&store).auth(|auth| auth.origins(origins));
            let fal = Fal { layer, connector: connector()? };
            let mut socket = fal.connect(&format!("wss://ws.fal.run/{app}").parse()?).await?;
            ask(&mut socket, &input).await
        }
    })
    .await
}

async fn demonstrate() -> Result<(), BoxError> {
    let [first, second] =
        [Credential::key("first-key:websocket-secret-1")?, Credential::key("second-key:websocket-secret-2")?];
    let mock = MockFal::start().await?;
    mock.accept(&first);
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("fal_key");
    write(&file, "first-key:websocket-secret-1\n")?;

    // The default interval is 5 s. With this one the store reads the file again only after a refusal.
    let source = FileSource::new(&file).poll_every(Duration::from_secs(60 * 60));
    let store = CredentialStore::builder(source).build().await?;
    // The default policy admits `wss` to fal only, and the mock speaks `ws`.
    let origins = FalOrigins::new().loopback_http().handshakes();
    let auth = FalAuthLayer::new(store.clone()).origins(origins.clone());
    let fal = Fal { layer: tower_fal::layer(&store).auth(|auth| auth.origins(origins)), connector: connector()? };
    let url = mock.ws_url("/fal-ai/flux/dev");

    println!("1  By hand: authorize() puts the credential on a handshake, and you do the rest.");
    let mut handshake = (&url).into_client_request()?;
    assert!(auth.authorize(&mut handshake));
    let (mut socket, _) = connect_async_tls_with_config(handshake, None, true, Some(fal.connector.clone())).await?;
    ask(&mut socket, r#"{"prompt":"a lighthouse"}"#).await?;

    println!("2  Another host gets no credential.");
    let mut handshake = "wss://ws.fal.run.example.com/fal-ai/flux/dev".into_client_request()?;
    println!("   authorize() says {}\n", auth.authorize(&mut handshake));

    println!(
        "3  With the layer. The file holds second-key and fal has revoked first-key, but the store still has first-key."
    );
    write(&file, "second-key:websocket-secret-2\n")?;
    mock.accept(&second);
    mock.revoke(&first);
    let mut socket = fal.connect(&url).await?;
    ask(&mut socket, r#"{"prompt":"a lighthouse at night"}"#).await?;
    println!("   the store now has {:?}\n", store.load().credential());

    println!("4  fal has revoked second-key, and the file holds no other.");
    mock.revoke(&second);
    match fal.connect(&url).await {
        Err(FalAuthError::Unauthorized(refusal)) => println!("   {:?}: {refusal}", refusal.reason()),
        other => return Err(format!("fal should have refused the handshake. The result is {other:?}").into()),
    }
    Ok(())
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// What a server keeps in order to open sockets.
struct Fal {
    layer: FalLayer,
    connector: Connector,
}

impl Fal {
    /// A handshake is a request, so the layer reloads and replays it like any other request.
    async fn connect(&self, url: &Uri) -> Result<Socket, FalAuthError> {
        let connector = self.connector.clone();
        let sockets = self.layer.layer(service_fn(move |request| handshake(request, connector.clone())));
        let request = url.into_client_request().map_err(|error| FalAuthError::Transport(error.into()))?;
        match sockets.oneshot(request.map(|()| Empty::new())).await?.into_body() {
            Answer::Opened(socket) => Ok(*socket),
            Answer::Refused(_) => Err(FalAuthError::Transport("fal did not open a socket".into())),
        }
    }
}

/// tokio-tungstenite as a service. It returns a refusal as a response and not as an error.
async fn handshake(
    request: Request<ReplayBody<Empty<Bytes>>>,
    connector: Connector,
) -> Result<Response<Answer>, tungstenite::Error> {
    match connect_async_tls_with_config(request.map(drop), None, true, Some(connector)).await {
        Ok((socket, response)) => Ok(response.map(|_| Answer::Opened(Box::new(socket)))),
        Err(tungstenite::Error::Http(response)) => {
            // The part of the body that arrived together with the head, which is usually all of it.
            Ok(response.map(|body| Answer::Refused(Full::from(body.unwrap_or_default()))))
        }
        Err(error) => Err(error),
    }
}

/// The body of the response to a handshake.
enum Answer {
    Opened(Box<Socket>),
    Refused(Full<Bytes>),
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Self::Opened(_) => Poll::Ready(None),
            Self::Refused(said) => Pin::new(said).poll_frame(cx),
        }
    }
}

/// TLS for `wss`. `ws` does not use it.
fn connector() -> Result<Connector, rustls::Error> {
    Ok(Connector::Rustls(Arc::new(demo::tls()?)))
}

/// Sends one request, and prints each message of the answer as soon as it arrives.
async fn ask(socket: &mut Socket, input: &str) -> Result<(), BoxError> {
    socket.send(Message::text(input)).await?;
    while let Some(message) = socket.next().await {
        match message? {
            Message::Text(text) => {
                println!("   {}", Printable(text.trim_end()));
                // Only messages of fal itself have both fields.
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
    Err("the socket was closed before the answer was complete".into())
}

/// Renames a complete file into place, so that nobody reads half a key.
fn write(file: &Path, key: &str) -> std::io::Result<()> {
    let new = file.with_extension("new");
    fs::write(&new, key)?;
    fs::rename(new, file)
}
