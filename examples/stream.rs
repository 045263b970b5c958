//! Server-sent events through `tower_fal::layer`. Each one is printed as soon as it arrives.
//!
//! ```text
//! cargo run --example stream                                                          a fal in this process
//! cargo run --example stream -- --live fal-ai/any-llm/stream '{"prompt":"a haiku"}'   the real one, which bills it
//! ```
//!
//! The first command needs no key, no network and no arguments: its fal sends an event only after the previous one was
//! printed. The second command needs `FAL_KEY`, or `FAL_KEY_ID` and `FAL_KEY_SECRET`, or `FAL_KEY_FILE`.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::process::ExitCode;

use bytes::Bytes;
use clap::Parser;
use http::{Request, Uri, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, Full};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower::{ServiceBuilder, ServiceExt as _};
use tower_fal::{Credential, CredentialStore, error::BoxError, mock::MockFal, origin::FalOrigins};

use self::{
    demo::{Live, Target},
    terminal::Printable,
};

mod demo;
mod terminal;

/// The longest event that is read, in bytes.
const MAX_EVENT: usize = 16 * 1024 * 1024;

/// Prints server-sent events as they arrive.
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
            let url = format!("https://fal.run/{app}").parse()?;
            stream(&store, FalOrigins::only(["fal.run"])?, url, &input, |event| println!("{}", Printable(event))).await
        }
    })
    .await
}

async fn demonstrate() -> Result<(), BoxError> {
    let credential = Credential::key("my-key:stream-secret")?;
    let fal = MockFal::start().await?;
    fal.accept(&credential);
    fal.hold_events_after(1);
    let store = CredentialStore::fixed(credential);
    let url = fal.run_url("/fal-ai/any-llm/stream");
    let mut seen = 0;
    stream(&store, FalOrigins::new().loopback_http(), url, r#"{"prompt":"a haiku"}"#, |event| {
        println!("{}", Printable(event));
        seen += 1;
        fal.hold_events_after(seen + 1);
    })
    .await?;
    println!("{seen} events, and fal sent each one only after the previous one was printed");
    Ok(())
}

/// Runs an app that streams, and calls `on_event` with the data of each event as soon as it is complete.
async fn stream(
    store: &CredentialStore,
    origins: FalOrigins,
    url: Uri,
    input: &str,
    mut on_event: impl FnMut(&str),
) -> Result<(), BoxError> {
    let connector = HttpsConnectorBuilder::new()
        .with_provider_and_webpki_roots(rustls::crypto::ring::default_provider())?
        .https_or_http()
        .enable_http1()
        .enable_http2()
        .build();
    let fal = ServiceBuilder::new()
        .layer(tower_fal::layer(store).auth(|auth| auth.origins(origins)))
        .service(Client::builder(TokioExecutor::new()).build(connector));

    let request = Request::post(url)
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::copy_from_slice(input.as_bytes())))?;
    let response = fal.oneshot(request).await?;
    let status = response.status();
    if !status.is_success() {
        return Err(format!("the app answered with {status}").into());
    }
    let mut body = response.into_body();
    let mut events = Events::default();
    while let Some(frame) = body.frame().await {
        let Ok(bytes) = frame?.into_data() else { continue };
        events.push(&bytes, &mut on_event)?;
    }
    Ok(())
}

/// The part of an event that has arrived so far. A frame of the body holds a part of an event, or several events.
#[derive(Default)]
struct Events {
    line: Vec<u8>,
    data: String,
}

impl Events {
    fn push(&mut self, bytes: &[u8], on_event: &mut impl FnMut(&str)) -> Result<(), BoxError> {
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
            } else {
                self.end_of_line(on_event)?;
            }
            if self.line.len() + self.data.len() > MAX_EVENT {
                return Err("an event is too long".into());
            }
        }
        Ok(())
    }

    /// An empty line ends an event. Comments and fields other than `data` are ignored.
    fn end_of_line(&mut self, on_event: &mut impl FnMut(&str)) -> Result<(), BoxError> {
        let line = std::mem::take(&mut self.line);
        let line = str::from_utf8(line.strip_suffix(b"\r").unwrap_or(&line))?;
        if let Some(data) = line.strip_prefix("data:") {
            self.data.push_str(data.strip_prefix(' ').unwrap_or(data));
            self.data.push('\n');
        } else if line.is_empty() && !self.data.is_empty() {
            on_event(self.data.trim_end_matches('\n'));
            self.data.clear();
        }
        Ok(())
    }
}
