//! A fal for programs in any language: [`MockFal`] as a process. `cargo run --example mock_fal -- --help`.
//!
//! ```text
//! cargo run --example mock_fal -- --listen 127.0.0.1:8443 --key my-key:not-a-secret --tls --ca-out ca.pem &
//! FAL_KEY=my-key:not-a-secret SSL_CERT_FILE=ca.pem \
//!     FAL_RUN_HOST=127.0.0.1:8443/run FAL_QUEUE_RUN_HOST=127.0.0.1:8443/queue python your_program.py
//! ```

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::{
    env,
    error::Error,
    fs, io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE, uri::Scheme},
    response::IntoResponse,
    routing::{get, post},
};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tower_fal::{
    Credential,
    error::report,
    mock::{Lock, MockFal, Presented, Received},
};

const HELP: &str = "\
A fal on this machine, for tests of programs in any language. It runs until SIGTERM or ctrl-c.

  --listen ADDR    where fal is played [127.0.0.1:0; with port 0, a free one]
  --control ADDR   where the control endpoint is: keep it to yourself [127.0.0.1:0]
  --key ID:SECRET  a key that is valid from the start; may be repeated. Make it up: arguments are for all to see
  --tls            speak https, with a certificate for localhost, 127.0.0.1, [::1], ADDR's own IP and fal's hosts
  --ca-out PATH    where to write the certificate of the CA that signed it, a new one each time
  --help           this

Once it listens it prints one line:

  fal on https://127.0.0.1:8443, control on http://127.0.0.1:8444

Which host of fal's a request is to: its `host` header tells (fal.run, queue.fal.run, ws.fal.run, rest.fal.ai,
api.fal.ai, v3.fal.media), or the beginning of its path: /run/..., /queue/..., /ws/..., /rest/..., /api/...,
/storage/... WebSockets are ws://ADDR/run/OWNER/APP/realtime and ws://ADDR/ws/OWNER/APP, with --tls wss://.
fal's Python client takes both as FAL_RUN_HOST=127.0.0.1:8443/run FAL_QUEUE_RUN_HOST=127.0.0.1:8443/queue.

Control:

  POST /accept    {\"key\":\"ID:SECRET\"}        makes a key valid
  POST /revoke    {\"key\":\"ID:SECRET\"}        makes it invalid: 401
  POST /lock      {\"reason\":\"TOP_UP\"}        locks the account: 403; without a body its balance is exhausted
  POST /unlock                             ends that
  GET  /received                           what came: {\"runs\":1,\"requests\":[{\"method\":\"POST\",\"host\":\"localhost\",
                                           \"path\":\"/run/a/b\",\"presented\":\"accepted\",\"key_id\":\"ID\",\"status\":200}]}
";

/// How long to wait when no connection can be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> ExitCode {
    let options = match Options::parse(env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("{error}\nSee --help.");
            return ExitCode::from(2);
        }
    };
    match run(options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", report(&*error));
            ExitCode::FAILURE
        }
    }
}

async fn run(options: Options) -> Result<(), Box<dyn Error>> {
    let fal = MockFal::start().await?;
    for key in &options.keys {
        fal.accept(key);
    }
    // Before anybody is told to come, so that a signal finds someone who waits for it.
    let end = end()?;
    let tls = options.ca_out.as_deref().map(|path| tls(options.listen.ip(), path)).transpose()?;
    let listener = TcpListener::bind(options.listen).await?;
    let control = TcpListener::bind(options.control).await?;
    println!(
        "fal on {}://{}, control on http://{}",
        if tls.is_some() { Scheme::HTTPS } else { Scheme::HTTP },
        listener.local_addr()?,
        control.local_addr()?
    );
    tokio::select! {
        () = serve(listener, tls, &fal) => Ok(()),
        served = axum::serve(control, control_of(fal.clone())) => Ok(served?),
        () = end => Ok(()),
    }
}

struct Options {
    listen: SocketAddr,
    control: SocketAddr,
    keys: Vec<Credential>,
    /// With TLS.
    ca_out: Option<PathBuf>,
}

impl Options {
    /// `None` asks for help. An error shows no argument that may be a key.
    fn parse(arguments: impl Iterator<Item = String>) -> Result<Option<Self>, String> {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut options = Self { listen: any, control: any, keys: Vec::new(), ca_out: None };
        let mut tls = false;
        let mut arguments = arguments.zip(1..);
        while let Some((name, at)) = arguments.next() {
            let mut value = || arguments.next().map(|(value, _)| value).ok_or_else(|| format!("{name} needs a value"));
            let address = |value: String| value.parse().map_err(|_| format!("{name} needs an IP address and a port"));
            match name.as_str() {
                "--listen" => options.listen = address(value()?)?,
                "--control" => options.control = address(value()?)?,
                "--key" => options.keys.push(Credential::key(value()?).map_err(|error| format!("--key: {error}"))?),
                "--ca-out" => options.ca_out = Some(value()?.into()),
                "--tls" => tls = true,
                "--help" | "-h" => return Ok(None),
                _ => return Err(format!("argument {at} is no option; the value of one is an argument of its own")),
            }
        }
        if tls != options.ca_out.is_some() {
            return Err("--tls and --ca-out need each other".to_owned());
        }
        Ok(Some(options))
    }
}

async fn serve(listener: TcpListener, tls: Option<TlsAcceptor>, fal: &MockFal) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Too many open files, perhaps: it passes.
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        // Best effort: without it an answer is late, not wrong.
        let _ = stream.set_nodelay(true);
        let (tls, fal) = (tls.clone(), fal.clone());
        tokio::spawn(async move {
            let Some(tls) = tls else { return fal.serve_connection(stream, Scheme::HTTP).await };
            match tokio::time::timeout(HANDSHAKE, tls.accept(stream)).await {
                Ok(Ok(stream)) => fal.serve_connection(stream, Scheme::HTTPS).await,
                Ok(Err(error)) => eprintln!("TLS handshake: {error}"),
                Err(_) => eprintln!("TLS handshake: it took too long"),
            }
        });
    }
}

/// A new CA, whose certificate is written to a file, and a server that it vouches for. Both keys stay in memory.
fn tls(listens_on: IpAddr, ca_out: &Path) -> Result<TlsAcceptor, Box<dyn Error>> {
    let ca_key = KeyPair::generate()?;
    let mut ca = CertificateParams::default();
    ca.distinguished_name.push(DnType::CommonName, "CA of a mock of fal");
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    fs::write(ca_out, ca.self_signed(&ca_key)?.pem())
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", ca_out.display())))?;

    let hosts = [
        "localhost",
        "127.0.0.1",
        "::1",
        "fal.run",
        "queue.fal.run",
        "ws.fal.run",
        "rest.fal.ai",
        "rest.alpha.fal.ai",
        "api.fal.ai",
        "v3.fal.media",
    ];
    let names = hosts.map(str::to_owned).into_iter().chain([listens_on.to_string()]);
    let key = KeyPair::generate()?;
    let mut server = CertificateParams::new(names.collect::<Vec<_>>())?;
    server.distinguished_name.push(DnType::CommonName, "a mock of fal");
    server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    // Python 3.13 wants to know which of a CA's keys it was.
    server.use_authority_key_identifier_extension = true;
    let certificate = server.signed_by(&key, &Issuer::new(ca, ca_key))?;

    // Named, so that it does not matter which other providers are compiled in.
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        )?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn control_of(fal: MockFal) -> Router {
    Router::new()
        .route("/accept", post(async |State(fal): State<MockFal>, body: Bytes| with_key(&body, |key| fal.accept(key))))
        .route("/revoke", post(async |State(fal): State<MockFal>, body: Bytes| with_key(&body, |key| fal.revoke(key))))
        .route("/lock", post(async |State(fal): State<MockFal>, body: Bytes| lock(&fal, &body)))
        .route("/unlock", post(async |State(fal): State<MockFal>| fal.unlock()))
        .route("/received", get(async |State(fal): State<MockFal>| received(&fal)))
        .with_state(fal)
}

type Answer = Result<(), (StatusCode, String)>;

/// Neither serde's error nor the body is for an answer: both may hold the secret.
fn with_key(body: &[u8], change: impl FnOnce(&Credential)) -> Answer {
    let bad = |text: String| (StatusCode::BAD_REQUEST, text);
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    let key = body["key"].as_str().ok_or_else(|| bad(r#"the body must be {"key":"ID:SECRET"}"#.to_owned()))?;
    change(&Credential::key(key).map_err(|error| bad(error.to_string()))?);
    Ok(())
}

fn lock(fal: &MockFal, body: &[u8]) -> Answer {
    const REASONS: [Lock; 7] = [
        Lock::ExhaustedBalance,
        Lock::Admin,
        Lock::TopUp,
        Lock::NoPaymentMethod,
        Lock::Archived,
        Lock::BudgetExceeded,
        Lock::Other,
    ];
    let reason = match body {
        [] => Some(Lock::ExhaustedBalance),
        body => {
            let body: Value = serde_json::from_slice(body).unwrap_or_default();
            // The first words will do: "Admin lock" and not the whole sentence.
            let begins = body["reason"].as_str().filter(|begins| !begins.is_empty());
            begins.and_then(|begins| REASONS.into_iter().find(|lock| lock.as_str().starts_with(begins)))
        }
    };
    let Some(reason) = reason else {
        let all = REASONS.map(Lock::as_str).join("\n  ");
        return Err((
            StatusCode::BAD_REQUEST,
            format!("the body must be {{\"reason\":…}}, with the beginning of:\n  {all}"),
        ));
    };
    fal.lock(reason);
    Ok(())
}

fn received(fal: &MockFal) -> impl IntoResponse + use<> {
    let requests: Vec<_> = fal.received().iter().map(described).collect();
    ([(CONTENT_TYPE, "application/json")], json!({ "runs": fal.runs(), "requests": requests }).to_string())
}

fn described(request: &Received) -> Value {
    json!({
        "method": request.method.as_str(),
        "host": request.host,
        "path": request.path,
        "presented": match request.presented {
            Presented::Nothing => "nothing",
            Presented::Accepted(_) => "accepted",
            _ => "refused",
        },
        "key_id": request.presented.key_id().map(ToString::to_string),
        "status": request.status.map(|status| status.as_u16()),
    })
}

/// Resolves on ctrl-c, and on SIGTERM where there is one.
#[cfg(unix)]
fn end() -> io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};

    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

#[cfg(not(unix))]
fn end() -> io::Result<impl Future<Output = ()>> {
    Ok(async {
        // If it cannot be waited for, then it ends only by force.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
    })
}
