//! Which credential does this environment resolve to, and from where? `cargo run --example whoami`.
//!
//! Looks where fal's own tools look (`ChainSource::fal_default`), and prints one line of JSON, never the secret:
//! `{"scheme":"Key","source":"env:FAL_KEY","key_id":"…","value_sha256":"…","account":null,"expires_at":null}`.
//!
//! * `value_sha256` is the SHA-256 of the value without its scheme, in hex, so that you can compare it with the one of
//!   another machine.
//! * `account` is the user id that is sent as `x-fal-user-id`.
//! * `expires_at` is in seconds since 1970.
//! * With `--check` there is also `accepted`: what fal says to the credential.
//!
//! When there is no usable credential, or fal cannot be asked, it prints `{"error":"…"}` and exits with 1.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::{env, process::ExitCode, time::Duration};

use bytes::Bytes;
use clap::Parser;
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty, Limited};
use serde::Serialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tower::{ServiceBuilder, ServiceExt as _};
use tower_fal::{
    Credential, CredentialStore, FalAuthLayer,
    error::{BoxError, Reason, classify, report},
    reqwest::ReqwestService,
    store::Snapshot,
};

use self::terminal::BaseUrl;

mod terminal;

/// The REST API, as fal's own SDK calls it.
///
/// Source: `fal` 1.83.0 (`flags.py`).
const REST_HOST: &str = "rest.alpha.fal.ai";

/// How long fal may take to answer.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The longest answer that is read, in bytes.
const MAX_ANSWER: usize = 64 * 1024;

/// Prints which credential this environment resolves to, and from where, as one line of JSON without the secret.
///
/// It looks where fal's own tools look: FAL_KEY, the profile in ~/.fal/config.toml, FAL_KEY_ID and FAL_KEY_SECRET, the
/// file that FAL_KEY_FILE names, and the login of `fal auth login`. FAL_FORCE_AUTH_BY_USER=1 skips the keys. FAL_PROFILE,
/// FAL_CONFIG_PATH and FAL_HOME_DIR mean what they mean to fal; HTTPS_PROXY, NO_PROXY and SSL_CERT_FILE are honoured.
#[derive(Parser)]
struct Arguments {
    /// Also asks fal whether it accepts the credential, and adds the answer as `accepted`
    #[arg(long)]
    check: bool,
    /// Keeps running for this long, and prints a further line each time that the credential changes
    #[arg(long, value_name = "SECONDS")]
    watch: Option<u64>,
}

#[derive(Serialize)]
struct Found {
    scheme: &'static str,
    source: String,
    key_id: Option<String>,
    value_sha256: String,
    account: Option<String>,
    expires_at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    accepted: Option<bool>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = match terminal::arguments::<Arguments>() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    let code = match whoami(&arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{}", json!({ "error": report(&*error) }));
            ExitCode::FAILURE
        }
    };
    // A login that is being renewed would be lost.
    tower_fal::login::settled().await;
    code
}

async fn whoami(arguments: &Arguments) -> Result<(), BoxError> {
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    let store = tokio::select! {
        store = CredentialStore::from_default() => store?,
        _ = &mut interrupted => return Err("interrupted".into()),
    };
    let watch = tokio::time::sleep(Duration::from_secs(arguments.watch.unwrap_or_default()));
    tokio::pin!(watch);
    let mut changes = store.subscribe();
    let mut shown = show(&store, arguments.check).await?;
    loop {
        tokio::select! {
            status = changes.wait_for(|status| status.generation > shown) => match status {
                Some(_) => shown = show(&store, arguments.check).await?,
                None => return Ok(()),
            },
            () = &mut watch => return Ok(()),
            _ = &mut interrupted => return Ok(()),
        }
    }
}

/// Prints one line, and returns the generation that it is about.
async fn show(store: &CredentialStore, check: bool) -> Result<tower_fal::Generation, BoxError> {
    let current = store.load();
    let accepted = if check { Some(is_accepted(current.credential()).await?) } else { None };
    println!("{}", serde_json::to_string(&found(&current, accepted))?);
    Ok(current.generation())
}

fn found(current: &Snapshot, accepted: Option<bool>) -> Found {
    let credential = current.credential();
    let header = credential.header().as_bytes();
    let value = &header[credential.scheme().as_str().len() + 1..];
    let seconds = |at: std::time::SystemTime| at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
    Found {
        scheme: credential.scheme().as_str(),
        source: current.source().to_owned(),
        key_id: credential.key_id().map(ToString::to_string),
        value_sha256: Sha256::digest(value).iter().map(|byte| format!("{byte:02x}")).collect(),
        account: credential.account().map(ToString::to_string),
        expires_at: credential.expires_at().map(seconds),
        accepted,
    }
}

/// Asks fal for the user of the credential. The layer puts the credential on the request, and on no other; there is no
/// second attempt with another one.
async fn is_accepted(credential: &Credential) -> Result<bool, BoxError> {
    let rest = rest()?;
    let auth = FalAuthLayer::new(CredentialStore::fixed(credential.clone())).origins(rest.origins);
    // The roots of this system and its proxies, as reqwest finds them.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = ReqwestService::new(reqwest::Client::builder().timeout(TIMEOUT))?;
    let fal = ServiceBuilder::new().layer(auth).service(client);

    let uri: Uri = format!("{}/users/current", rest.url).parse()?;
    let response = fal.oneshot(Request::get(uri).body(Empty::<Bytes>::new())?).await?;
    let (head, body) = response.into_parts();
    let body = Limited::new(body, MAX_ANSWER).collect().await?.to_bytes();
    match head.status {
        status if status.is_success() => Ok(true),
        StatusCode::UNAUTHORIZED => Ok(false),
        StatusCode::FORBIDDEN => {
            // The key is valid, and lacks the permission for this one call.
            let said = classify(head.status, &head.headers, &body, Some(credential));
            Ok(said.reason == Reason::InsufficientPermissions)
        }
        status => Err(format!("fal answered {status}, which does not say whether it accepts the credential").into()),
    }
}

/// The REST API, or what `FAL_REST_HOST` names in its place: a host, or a URL. Only one on this machine may do without
/// TLS.
fn rest() -> Result<BaseUrl, BoxError> {
    let host = env::var("FAL_REST_HOST").ok().filter(|host| !host.is_empty()).unwrap_or_else(|| REST_HOST.to_owned());
    let name = host.rsplit_once(':').map_or(&*host, |(name, _)| name);
    let url = match name {
        _ if host.contains("://") => host,
        "localhost" | "127.0.0.1" | "[::1]" => format!("http://{host}"),
        _ => format!("https://{host}"),
    };
    url.parse().map_err(|error| format!("FAL_REST_HOST: {error}").into())
}
