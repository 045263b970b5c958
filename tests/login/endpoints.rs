//! The client that is used if nobody brings one: fal's own hosts, over TLS, through the proxy of the system.

use std::{env, path::Path, process::Stdio};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use tokio::process::Command;
use tower_fal::{
    error::report,
    login::{LoginSource, settled},
    mock::{Endpoint, MockAuthorization},
    source::CredentialSource as _,
};

use crate::{
    proxy::Proxy,
    support::{EXPIRED, World, token, without_network},
};

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
    without_network(&mut command);
    command.env("FAL_HOME_DIR", world.home.path()).env("FAL_CONFIG_PATH", world.home.path().join("config.toml"));
    command.envs(variables.iter().copied()).stderr(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let said = text.lines().find(|line| line.starts_with("token ") || line.starts_with("error "));
    said.unwrap_or_else(|| panic!("{text}")).to_owned()
}

async fn world() -> (World, Proxy) {
    let world = World { server: MockAuthorization::start().await.unwrap(), home: tempfile::tempdir().unwrap() };
    world.server.add_team("Acme", "team-acme");
    world.choose("acme");
    world.write(world.server.log_in_with_access(EXPIRED));
    let proxy = Proxy::start(&world.server).await;
    (world, proxy)
}

#[tokio::test]
async fn fals_hosts_are_asked_over_tls_through_the_proxy() {
    let (world, proxy) = world().await;
    let roots = proxy.roots(&world);
    let roots = roots.to_str().unwrap();
    let user = proxy.url().replace("http://", "http://user:hush@");
    let said = run(&world, "", &[("HTTPS_PROXY", &user), ("SSL_CERT_FILE", roots)]).await;
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
    let roots = proxy.roots(&world);
    let roots = roots.to_str().unwrap();
    let variables = [("HTTPS_PROXY", &*proxy.url()), ("SSL_CERT_FILE", roots), ("NO_PROXY", "auth.fal.ai")];
    let said = run(&world, "", &variables).await;
    // Nothing of fal can be reached from a test, or it does not have our certificate.
    assert!(said.starts_with("error ") && said.contains("https://auth.fal.ai cannot be reached"), "{said}");
    assert!(proxy.asked().is_empty());
    assert_eq!(world.server.received(Endpoint::Token), 0);
}

#[tokio::test]
async fn no_token_is_sent_to_a_certificate_of_an_unknown_issuer() {
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
async fn an_error_about_missing_roots_names_the_variable() {
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
async fn no_error_of_a_proxy_shows_its_password() {
    let (world, proxy) = world().await;
    let roots = proxy.roots(&world);
    let roots = roots.to_str().unwrap();
    for url in [proxy.url().replace("http://", "https://user:hush@"), "http://user:hush@127.0.0.1:1".to_owned()] {
        let said = run(&world, "", &[("HTTPS_PROXY", &*url), ("SSL_CERT_FILE", roots)]).await;
        assert!(said.contains("HTTPS_PROXY") && !said.contains("hush"), "{said}");
    }
    assert_eq!(world.server.received(Endpoint::Token), 0);
}

#[tokio::test]
async fn what_is_sent_in_clear_stays_on_this_machine() {
    let (world, proxy) = world().await;
    let roots = proxy.roots(&world);
    let roots = roots.to_str().unwrap();
    let variables = [("HTTP_PROXY", &*proxy.url()), ("ALL_PROXY", &*proxy.url()), ("SSL_CERT_FILE", roots)];
    let said = run(&world, &world.server.url(), &variables).await;
    assert!(said.ends_with("team-acme"), "{said}");
    assert!(proxy.asked().is_empty());
}
