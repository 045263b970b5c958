//! The client that is used if nobody brings one: fal's own hosts, over TLS, through the proxy of the system.

use std::{
    env,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rcgen::CertifiedKey;
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    process::Command,
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;
use tower_fal::{
    error::report,
    login::{LoginSource, settled},
    mock::{Endpoint, MockAuthorization},
    source::CredentialSource as _,
};

use crate::support::{EXPIRED, World, token};

const CHILD: &str = "TOWER_FAL_LOGIN_CLIENT";

/// What a child does, which has proxies and roots of its own in its environment.
#[tokio::test]
async fn child() {
    let Ok(url) = env::var(CHILD) else { return };
    let mut source = LoginSource::new();
    if !url.is_empty() {
        source = source.authority(&url).unwrap().rest(&url).unwrap();
    }
    match source.load().await {
        Ok(credential) => {
            let credential = credential.unwrap();
            println!("\ntoken {} {}", token(&credential), credential.account().unwrap());
        }
        Err(error) => println!("\nerror {}", report(&error)),
    }
    settled().await;
}

/// Runs a child in this world; `url` is another server than fal's own hosts. Returns what it says.
async fn run(world: &World, url: &str, variables: &[(&str, &str)]) -> String {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "endpoints::child", "--nocapture"]).env(CHILD, url);
    for name in ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"] {
        command.env_remove(name);
    }
    command.env_remove("SSL_CERT_DIR");
    command.env("FAL_HOME_DIR", world.home.path()).env("FAL_CONFIG_PATH", world.home.path().join("config.toml"));
    command.envs(variables.iter().copied()).stderr(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let said = text.lines().find(|line| line.starts_with("token ") || line.starts_with("error "));
    said.unwrap_or_else(|| panic!("{text}")).to_owned()
}

/// A proxy behind which all hosts are the mock, with a certificate for fal's own.
struct Proxy {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    certificate: String,
    _accepting: JoinSet<()>,
}

impl Proxy {
    async fn start(server: &MockAuthorization) -> Self {
        let hosts = ["auth.fal.ai", "rest.alpha.fal.ai"].map(str::to_owned);
        let CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(hosts).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)
            .unwrap();
        let tls = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::default());
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, tls, server.clone(), Arc::clone(&asked)));
        Self { address, asked, certificate: cert.pem(), _accepting: accepting }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The first lines and the authorizations of the requests so far.
    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, server: MockAuthorization, asked: Arc<Mutex<Vec<String>>>) {
    let mut connections = JoinSet::new();
    while let Ok((mut socket, _)) = listener.accept().await {
        let (tls, server, asked) = (tls.clone(), server.clone(), Arc::clone(&asked));
        connections.spawn(async move {
            let head = head(&mut socket).await;
            let mut lines = head.lines();
            let first = lines.next().unwrap_or_default().to_owned();
            let authorization = lines.find_map(|line| line.strip_prefix("Proxy-Authorization: ")).unwrap_or_default();
            asked.lock().unwrap().push(format!("{first} {authorization}").trim().to_owned());
            socket.write_all(b"HTTP/1.1 200 Connected\r\n\r\n").await.unwrap();
            if let Ok(stream) = tls.accept(socket).await {
                server.serve_connection(stream).await;
            }
        });
    }
}

async fn head(socket: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(socket.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

async fn world() -> (World, Proxy) {
    let world = World { server: MockAuthorization::start().await.unwrap(), home: tempfile::tempdir().unwrap() };
    world.server.add_team("Acme", "team-acme");
    world.choose("acme");
    world.write(world.server.log_in_with_access(EXPIRED));
    let proxy = Proxy::start(&world.server).await;
    (world, proxy)
}

fn trust(world: &World, proxy: &Proxy) -> String {
    let path = world.home.path().join("ca.pem");
    std::fs::write(&path, &proxy.certificate).unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn fals_hosts_are_asked_over_tls_through_the_proxy() {
    let (world, proxy) = world().await;
    let roots = trust(&world, &proxy);
    let user = proxy.url().replace("http://", "http://user:hush@");
    let said = run(&world, "", &[("HTTPS_PROXY", &user), ("SSL_CERT_FILE", &roots)]).await;
    assert_eq!(said, format!("token {} team-acme", world.tokens()[1]));
    let basic = STANDARD.encode("user:hush");
    assert_eq!(
        proxy.asked(),
        ["auth.fal.ai", "rest.alpha.fal.ai"].map(|host| format!("CONNECT {host}:443 HTTP/1.1 Basic {basic}"))
    );
    assert_eq!(world.server.refreshes(), 1);
}

#[tokio::test]
async fn no_proxy_keeps_a_host_from_the_proxy() {
    let (world, proxy) = world().await;
    let roots = trust(&world, &proxy);
    let variables = [("HTTPS_PROXY", &*proxy.url()), ("SSL_CERT_FILE", &*roots), ("NO_PROXY", "auth.fal.ai")];
    let said = run(&world, "", &variables).await;
    // Nothing of fal can be reached from a test, or it does not have our certificate.
    assert!(said.starts_with("error ") && said.contains("https://auth.fal.ai cannot be reached"), "{said}");
    assert!(proxy.asked().is_empty());
    assert_eq!(world.server.received(Endpoint::Token), 0);
}

#[tokio::test]
async fn a_certificate_of_an_unknown_issuer_ends_it_before_the_token_is_sent() {
    let (world, proxy) = world().await;
    let other = rcgen::generate_simple_self_signed(["auth.fal.ai".to_owned()]).unwrap().cert.pem();
    let roots = world.home.path().join("other.pem");
    std::fs::write(&roots, other).unwrap();
    let variables = [("HTTPS_PROXY", &*proxy.url()), ("SSL_CERT_FILE", roots.to_str().unwrap())];
    let said = run(&world, "", &variables).await;
    assert!(said.contains("invalid peer certificate"), "{said}");
    assert_eq!(world.server.received(Endpoint::Token), 0);
}

#[tokio::test]
async fn roots_that_cannot_be_read_are_an_error_that_names_the_variable() {
    let (world, proxy) = world().await;
    let empty = world.home.path().join("empty.pem");
    std::fs::write(&empty, "").unwrap();
    for roots in [&*empty, Path::new("/nowhere.pem")] {
        let variables = [("HTTPS_PROXY", &*proxy.url()), ("SSL_CERT_FILE", roots.to_str().unwrap())];
        let said = run(&world, "", &variables).await;
        assert!(said.contains("install ca-certificates, or set SSL_CERT_FILE"), "{said}");
    }
    assert_eq!(world.server.received(Endpoint::Token), 0);
}

#[tokio::test]
async fn a_proxy_of_another_kind_is_refused_and_its_password_not_shown() {
    let (world, proxy) = world().await;
    let roots = trust(&world, &proxy);
    for url in [proxy.url().replace("http://", "https://user:hush@"), "http://user:hush@127.0.0.1:1".to_owned()] {
        let said = run(&world, "", &[("HTTPS_PROXY", &*url), ("SSL_CERT_FILE", &*roots)]).await;
        assert!(said.contains("HTTPS_PROXY") && !said.contains("hush"), "{said}");
    }
    assert_eq!(world.server.received(Endpoint::Token), 0);
}

#[tokio::test]
async fn what_is_sent_in_clear_stays_on_this_machine() {
    let (world, proxy) = world().await;
    let roots = trust(&world, &proxy);
    let variables = [("HTTP_PROXY", &*proxy.url()), ("ALL_PROXY", &*proxy.url()), ("SSL_CERT_FILE", &*roots)];
    let said = run(&world, &world.server.url(), &variables).await;
    assert!(said.ends_with("team-acme"), "{said}");
    assert!(proxy.asked().is_empty());
}
