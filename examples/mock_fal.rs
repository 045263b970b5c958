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
    fs, io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::{Bytes, HttpBody as _},
    extract::{ConnectInfo, Request, State},
    http::{
        Method, StatusCode,
        header::{CONTENT_TYPE, HOST, ORIGIN},
        uri::{Authority, Scheme},
    },
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use clap::Parser;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tower_fal::{
    Credential, CredentialError,
    error::BoxError,
    mock::{Answer, Failure, Lock, MockFal, Presented, Received},
};

mod terminal;

/// A fal on this machine, for tests of programs in any language. It runs until SIGTERM or ctrl-c.
#[derive(Parser)]
#[command(after_help = AFTER_HELP)]
struct Options {
    /// Where fal is. With port 0 the system chooses a free port
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Where the control endpoint is. Whoever can reach it controls this fal
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    control: SocketAddr,
    /// A key that is valid from the start. It may be repeated. Never use a real one: other users of this machine can
    /// read the arguments of a process
    #[arg(long = "key", value_name = "ID:SECRET", value_parser = key)]
    keys: Vec<Credential>,
    /// Keep the query, the headers and the body of each request for `GET /received`
    #[arg(long)]
    keep_content: bool,
    /// Speak https. The certificate is for localhost, 127.0.0.1, [::1], the IP of --listen, and fal's hosts
    #[arg(long, requires = "ca_out")]
    tls: bool,
    /// Where to write the certificate of the CA that signed it. The CA is a new one each time
    #[arg(long, value_name = "PATH", requires = "tls")]
    ca_out: Option<PathBuf>,
}

const AFTER_HELP: &str = r#"When it is ready it prints one line:

  fal on https://127.0.0.1:8443, control on http://127.0.0.1:8444

The `host` header of a request says which of fal's hosts it is for: fal.run, queue.fal.run,
ws.fal.run, rest.fal.ai, api.fal.ai or v3.fal.media. With any other host, the path begins with
the name: /run/..., /queue/..., /ws/..., /rest/..., /api/... or /storage/...

  HTTP          http://ADDR/run/OWNER/APP, http://ADDR/queue/OWNER/APP
  WebSockets    ws://ADDR/run/OWNER/APP/realtime, ws://ADDR/ws/OWNER/APP
  with --tls    the same with https:// and wss://
  Python        FAL_RUN_HOST=127.0.0.1:8443/run FAL_QUEUE_RUN_HOST=127.0.0.1:8443/queue

The control endpoint takes JSON:

  curl --json '{"key":"my-key:not-a-secret"}' http://127.0.0.1:8444/revoke

  POST /accept {"key":"ID:SECRET"}
      Makes a key valid.
  POST /revoke {"key":"ID:SECRET"}
      Makes a key invalid: 401.
  POST /lock {"reason":"TOP_UP"}
      Locks the account: 403. Without a body, the balance is exhausted.
  POST /unlock
      Ends the lock.
  POST /answer {"app":"OWNER/APP","body":{...},"status":200,"runner":true}
      Sets what an app answers. Without "body", the app answers as it did at first.
      With "runner":false, the answer has no headers of a runner.
  POST /fail {"path":"/OWNER/APP","n":1,"status":503}
      Lets the next n requests to this path and below it fail. Without "path": to any path.
  GET /received
      Shows what arrived: {"runs":1,"requests":[{"method":"POST","host":"localhost",
      "path":"/run/a/b","presented":"accepted","key_id":"ID","status":200}]}.
      With --keep-content, each request also has "query", "headers" and "body".

Web pages in a browser on this machine cannot use it. It refuses requests with an `origin`
header, with a `host` that is neither localhost nor an IP address, and with a body that is not
application/json.
"#;

/// How long to wait when no connection can be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> ExitCode {
    terminal::run(run).await
}

async fn run(options: Options) -> Result<(), BoxError> {
    let fal = MockFal::start().await?;
    fal.keep_content(options.keep_content);
    for key in &options.keys {
        fal.accept(key);
    }
    // Before the line is printed, so that no signal comes too early.
    let end = end()?;
    let listener = bind("--listen", options.listen).await?;
    let control = bind("--control", options.control).await?;
    // After the ports are ours: another process there may still use the CA of this file.
    let tls = options.ca_out.as_deref().map(|path| tls(options.listen.ip(), path)).transpose()?;
    println!(
        "fal on {}://{}, control on http://{}",
        if tls.is_some() { Scheme::HTTPS } else { Scheme::HTTP },
        listener.local_addr()?,
        control.local_addr()?
    );
    let control_service = control_of(fal.clone()).into_make_service_with_connect_info::<SocketAddr>();
    tokio::select! {
        () = serve(listener, tls, &fal) => Ok(()),
        served = axum::serve(control, control_service) => Ok(served?),
        () = end => Ok(()),
    }
}

fn key(text: &str) -> Result<Credential, CredentialError> {
    Credential::key(text)
}

/// `option` is where the address comes from.
async fn bind(option: &str, address: SocketAddr) -> Result<TcpListener, String> {
    let failed = |error| format!("cannot listen on {address}: {error}. Choose another address with {option}.");
    TcpListener::bind(address).await.map_err(failed)
}

async fn serve(listener: TcpListener, tls: Option<TlsAcceptor>, fal: &MockFal) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Perhaps too many files are open. That ends by itself.
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        // If this fails, answers are a little later and no less right.
        let _ = stream.set_nodelay(true);
        let (tls, fal) = (tls.clone(), fal.clone());
        tokio::spawn(async move {
            let Some(tls) = tls else { return fal.serve_connection(stream, Scheme::HTTP).await };
            match tokio::time::timeout(HANDSHAKE, tls.accept(stream)).await {
                Ok(Ok(stream)) => fal.serve_connection(stream, Scheme::HTTPS).await,
                Ok(Err(error)) => eprintln!("TLS handshake: {error}"),
                Err(_) => eprintln!("TLS handshake: timeout"),
            }
        });
    }
}

/// Makes a CA, writes its certificate to a file, and makes a server whose certificate it signed. Both keys stay in
/// memory.
fn tls(listens_on: IpAddr, ca_out: &Path) -> Result<TlsAcceptor, BoxError> {
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
    // Python 3.13 requires it.
    server.use_authority_key_identifier_extension = true;
    let certificate = server.signed_by(&key, &Issuer::new(ca, ca_key))?;

    // The provider is named here, so that it does not matter which others are compiled in.
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
        .route("/answer", post(async |State(fal): State<MockFal>, body: Bytes| answer(&fal, &body)))
        .route("/fail", post(async |State(fal): State<MockFal>, body: Bytes| fail(&fal, &body)))
        .route("/received", get(async |State(fal): State<MockFal>| received(&fal)))
        .layer(middleware::from_fn(guard))
        .with_state(fal)
}

/// Keeps web pages away. A browser lets any page send requests to a port of its own machine.
async fn guard(ConnectInfo(peer): ConnectInfo<SocketAddr>, request: Request, next: Next) -> Response {
    match objection(peer, &request) {
        Some(objection) => objection.into_response(),
        None => next.run(request).await,
    }
}

fn objection(peer: SocketAddr, request: &Request) -> Option<(StatusCode, &'static str)> {
    let headers = request.headers();
    // A browser adds it to each POST and to each request that a script may read.
    if headers.contains_key(ORIGIN) {
        return Some((StatusCode::FORBIDDEN, "the control endpoint takes no requests from web pages\n"));
    }
    // A page whose name was made to lead to this machine needs no such header for a GET. It cannot choose this one.
    if peer.ip().to_canonical().is_loopback() && !is_this_machine(request) {
        return Some((StatusCode::MISDIRECTED_REQUEST, "the `host` must be localhost or an IP address\n"));
    }
    // A page may send other types without asking first.
    let is_json = headers.get(CONTENT_TYPE).is_some_and(|value| {
        let essence = value.as_bytes().split(|&byte| byte == b';').next().unwrap_or_default();
        essence.trim_ascii().eq_ignore_ascii_case(b"application/json")
    });
    if request.method() == Method::POST && !request.body().is_end_stream() && !is_json {
        return Some((StatusCode::UNSUPPORTED_MEDIA_TYPE, "the `content-type` must be application/json\n"));
    }
    None
}

fn is_this_machine(request: &Request) -> bool {
    let in_header = || request.headers().get(HOST).and_then(|host| Authority::try_from(host.as_bytes()).ok());
    let Some(authority) = request.uri().authority().cloned().or_else(in_header) else { return false };
    let host = authority.host();
    let ip = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost") || ip.parse::<IpAddr>().is_ok()
}

type Outcome = Result<(), (StatusCode, String)>;

/// Reads a body. The error of serde is not shown, nor the body: both may hold a secret.
fn read<T: for<'a> Deserialize<'a>>(body: &[u8], form: &str) -> Result<T, (StatusCode, String)> {
    serde_json::from_slice(body).map_err(|_| bad(format!("the body must be {form}")))
}

fn bad(text: String) -> (StatusCode, String) {
    (StatusCode::BAD_REQUEST, text + "\n")
}

#[derive(Deserialize)]
struct Key {
    key: String,
}

fn with_key(body: &[u8], change: impl FnOnce(&Credential)) -> Outcome {
    let Key { key } = read(body, r#"{"key":"ID:SECRET"}"#)?;
    change(&Credential::key(key).map_err(|error| bad(error.to_string()))?);
    Ok(())
}

#[derive(Deserialize)]
struct Locking {
    reason: String,
}

fn lock(fal: &MockFal, body: &[u8]) -> Outcome {
    const REASONS: [Lock; 7] = [
        Lock::ExhaustedBalance,
        Lock::Admin,
        Lock::TopUp,
        Lock::NoPaymentMethod,
        Lock::Archived,
        Lock::BudgetExceeded,
        Lock::Other,
    ];
    if body.is_empty() {
        fal.lock(Lock::ExhaustedBalance);
        return Ok(());
    }
    let form = format!("{{\"reason\":...}}, with the beginning of:\n  {}", REASONS.map(Lock::as_str).join("\n  "));
    let Locking { reason } = read(body, &form)?;
    // The first words are enough: "Admin lock" and not the whole sentence.
    let lock = REASONS.into_iter().find(|lock| !reason.is_empty() && lock.as_str().starts_with(&reason));
    fal.lock(lock.ok_or_else(|| bad(format!("the body must be {form}")))?);
    Ok(())
}

#[derive(Deserialize)]
struct Answering {
    app: String,
    body: Option<Value>,
    #[serde(default = "Answering::status")]
    status: u16,
    #[serde(default = "Answering::runner")]
    runner: bool,
}

impl Answering {
    fn status() -> u16 {
        200
    }

    fn runner() -> bool {
        true
    }
}

fn answer(fal: &MockFal, body: &[u8]) -> Outcome {
    let form = r#"{"app":"OWNER/APP","body":{...},"status":200,"runner":true}"#;
    let Answering { app, body, status, runner } = read(body, form)?;
    let status = final_status(status)?;
    let Some(body) = body else {
        fal.clear_answer(&app);
        return Ok(());
    };
    let answer = Answer::json(body).status(status);
    fal.answer(&app, if runner { answer } else { answer.without_runner_headers() });
    Ok(())
}

#[derive(Deserialize)]
struct Failing {
    #[serde(default)]
    path: String,
    #[serde(default = "Failing::n")]
    n: usize,
    status: u16,
}

impl Failing {
    fn n() -> usize {
        1
    }
}

fn fail(fal: &MockFal, body: &[u8]) -> Outcome {
    let Failing { path, n, status } = read(body, r#"{"path":"/OWNER/APP","n":1,"status":503}"#)?;
    fal.fail_next_on(&path, n, Failure::Status(final_status(status)?));
    Ok(())
}

fn final_status(status: u16) -> Result<StatusCode, (StatusCode, String)> {
    let status = StatusCode::from_u16(status).ok().filter(|status| !status.is_informational());
    status.ok_or_else(|| bad("the status must be from 200 to 999".to_owned()))
}

fn received(fal: &MockFal) -> impl IntoResponse + use<> {
    let requests: Vec<_> = fal.received().iter().map(described).collect();
    ([(CONTENT_TYPE, "application/json")], json!({ "runs": fal.runs(), "requests": requests }).to_string())
}

fn described(request: &Received) -> Value {
    let mut described = json!({
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
    });
    if let Some(query) = &request.query {
        described["query"] = query.as_str().into();
    }
    for (name, value) in &request.headers {
        described["headers"][name.as_str()] = String::from_utf8_lossy(value.as_bytes()).into();
    }
    if let Some(body) = &request.body {
        described["body"] = String::from_utf8_lossy(body).into();
    }
    described
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
        // If nobody can wait for ctrl-c, only a kill ends the process.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
    })
}
