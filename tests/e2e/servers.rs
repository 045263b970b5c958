//! fal over TLS, and an example in front of it as a process.

use std::{env, fs, path::PathBuf, process::Stdio, sync::Arc, time::Duration};

use http::uri::Scheme;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    net::TcpListener,
    process::{Child, Command},
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;
use tower_fal::{
    Credential,
    mock::{MockFal, Presented, Received},
};

use crate::browser::Page;

/// How long a server may take to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// What no log and no answer may hold.
const SECRET: &str = "a-secret-that-stays-here";

/// fal, an example in front of it, and a page that uses both.
pub(crate) struct Servers {
    pub(crate) fal: MockFal,
    pub(crate) page: Page,
    proxy: Child,
    log: JoinHandle<String>,
    directory: TempDir,
    listener: JoinHandle<()>,
    rotations: u64,
}

impl Servers {
    /// Starts the example `proxy`, with more options.
    pub(crate) async fn start(more: &[&str]) -> Self {
        Self::of("proxy", more).await
    }

    /// Starts an example that stands between fal and a page. fal accepts the first key, which the example has from a file.
    pub(crate) async fn of(name: &str, more: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (fal, ca) = (MockFal::start().await.unwrap(), directory.path().join("ca.pem"));
        fal.keep_content(true);
        let key_file = directory.path().join("key");
        fs::write(&key_file, key_text(0)).unwrap();
        fal.accept(&key(0));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let listener = tokio::spawn(listen(listener, tls(&ca), fal.clone()));

        let mut command = Command::new(example(name));
        command
            .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--allow-anonymous"])
            .args(["--connect-to", &address.to_string()])
            .arg("--ca-file")
            .arg(&ca)
            .arg("--key-file")
            .arg(&key_file)
            .args(more);
        let (proxy, origin, log) = started(command).await;
        let page = Page::with_client(&origin, &address.to_string()).await;
        Self { fal, page, proxy, log, directory, listener, rotations: 0 }
    }

    /// Gives the proxy another key, and lets fal refuse the old one from now on.
    pub(crate) fn rotate(&mut self) {
        let old = key(self.rotations);
        self.rotations += 1;
        self.fal.accept(&key(self.rotations));
        self.fal.revoke(&old);
        // As a Secret is replaced: whole.
        let (file, new) = (self.directory.path().join("key"), self.directory.path().join("new"));
        fs::write(&new, key_text(self.rotations)).unwrap();
        fs::rename(new, file).unwrap();
    }

    /// The one request with this path that arrived at fal.
    pub(crate) fn received(&self, path: &str) -> Received {
        let found: Vec<_> = self.fal.received().into_iter().filter(|request| request.path == path).collect();
        assert_eq!(found.len(), 1, "requests to {path}");
        found.into_iter().next().unwrap()
    }

    /// Ends everything. The secret is nowhere but in the requests for fal.
    pub(crate) async fn stop(self) {
        for request in self.fal.received() {
            // Uploads go straight to the storage, by URLs that are signed.
            assert_eq!(request.presented == Presented::Nothing, request.host.starts_with("v3."), "{request:?}");
        }
        self.page.close().await;
        let log = ended(self.proxy, self.log).await;
        assert!(!log.contains(SECRET), "{log}");
        self.listener.abort();
    }
}

/// Ends a server, and returns what it has written.
pub(crate) async fn ended(mut server: Child, log: JoinHandle<String>) -> String {
    let process = rustix::process::Pid::from_raw(server.id().unwrap().try_into().unwrap()).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::TERM).unwrap();
    tokio::time::timeout(PATIENCE, server.wait()).await.expect("the server does not end").unwrap();
    log.await.unwrap()
}

fn key(number: u64) -> Credential {
    Credential::key(key_text(number)).unwrap()
}

fn key_text(number: u64) -> String {
    format!("e2e-key-{number}:{SECRET}-{number}")
}

/// A server that has said where it listens.
pub(crate) async fn started(mut command: Command) -> (Child, String, JoinHandle<String>) {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let (mut stdout, mut stderr) = (BufReader::new(child.stdout.take().unwrap()), child.stderr.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).await.unwrap();
    let log = tokio::spawn(async move {
        let (mut log, mut more) = (String::new(), String::new());
        let _ = tokio::join!(stderr.read_to_string(&mut log), stdout.read_to_string(&mut more));
        log + &more
    });
    let Some(url) = line.trim_end().strip_prefix("listening on ") else { panic!("{line}{}", log.await.unwrap()) };
    (child, url.to_owned(), log)
}

async fn listen(listener: TcpListener, tls: TlsAcceptor, fal: MockFal) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let (tls, fal) = (tls.clone(), fal.clone());
        tokio::spawn(async move {
            if let Ok(stream) = tls.accept(stream).await {
                fal.serve_connection(stream, Scheme::HTTPS).await;
            }
        });
    }
}

/// A CA of its own, and a server with fal's names.
fn tls(ca_out: &PathBuf) -> TlsAcceptor {
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::default();
    ca.distinguished_name.push(DnType::CommonName, "CA of a test");
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    fs::write(ca_out, ca.self_signed(&ca_key).unwrap().pem()).unwrap();
    let names = ["fal.run", "queue.fal.run", "rest.fal.ai", "v3.fal.media"].map(str::to_owned);
    let (key, server) = (KeyPair::generate().unwrap(), CertificateParams::new(names).unwrap());
    let certificate = server.signed_by(&key, &Issuer::new(ca, ca_key)).unwrap();
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        )
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    TlsAcceptor::from(Arc::new(config))
}

/// An example, which Cargo builds first, with the profile and in the target directory of these tests.
pub(crate) fn example(name: &str) -> PathBuf {
    let tests = env::current_exe().unwrap();
    let directory = tests.ancestors().nth(2).unwrap();
    let profile = directory.file_name().unwrap().to_str().unwrap();
    let mut cargo = std::process::Command::new(env!("CARGO"));
    cargo
        .args(["build", "--frozen", "--message-format=json", "--example", name])
        .args(["--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")])
        .args(["--profile", if profile == "debug" { "dev" } else { profile }])
        .arg("--target-dir")
        .arg(directory.parent().unwrap());
    // What Cargo tells a test of its package, ring's build script would take for a reason to build ring anew.
    for (variable, _) in env::vars_os() {
        if variable.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            cargo.env_remove(variable);
        }
    }
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let artifacts = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>().map(Result::unwrap);
    let mut executables = artifacts.filter(|artifact| artifact["target"]["name"] == name);
    executables.find_map(|artifact| artifact["executable"].as_str().map(PathBuf::from)).unwrap()
}
