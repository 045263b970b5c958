//! Logs in to fal as `fal auth login` does, for a Rust program on this machine. `cargo run --example login -- --demo`
//! plays it all against a server inside this process.
//!
//! | arguments | |
//! |---|---|
//! | `[login] [--connection github\|google\|DOMAIN] [--no-browser]` | prints a URL and a code, waits until you have confirmed it in a browser, and writes the login to `~/.fal` |
//! | `status` | finds the login, renews it if it is due, and says which account it acts for |
//! | `logout` | has fal forget the login, and removes it |
//! | `--demo` | the same, one after the other, without an account |
//!
//! It looks where fal's own tools look: `HOME`, `FAL_HOME_DIR`, `FAL_CONFIG_PATH`. Its requests honour `HTTPS_PROXY`,
//! `NO_PROXY` and `SSL_CERT_FILE`. If something fails, also by ctrl-c, there is one line on stderr, and the exit code
//! is 1.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::{
    io::{IsTerminal as _, Write as _, stderr, stdout},
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    str::FromStr,
    time::{Duration, SystemTime},
};

use clap::{Args, Parser};
use tower_fal::{
    Credential,
    error::BoxError,
    login::{Connection, DeviceLogin, LoginSource, PendingLogin, settled},
    mock::MockAuthorization,
    source::{CredentialSource as _, ProfileSource},
};

mod terminal;

use self::terminal::Printable;

/// Logs in to fal as `fal auth login` does, and keeps the login where fal's own tools find it.
///
/// HOME, FAL_HOME_DIR and FAL_CONFIG_PATH mean what they mean to fal; HTTPS_PROXY, NO_PROXY and SSL_CERT_FILE are
/// honoured.
#[derive(Parser)]
struct Arguments {
    /// login, logout or status
    #[arg(default_value = "login")]
    action: Action,
    /// With whom you have an account: github, google, or the domain of a single sign-on. Without it you are asked in the
    /// browser
    #[arg(long)]
    connection: Option<Connection>,
    /// Only print the URL
    #[arg(long)]
    no_browser: bool,
    /// Play a login, a renewal and a logout against a server inside this process: no account, no network, no browser
    #[arg(long, conflicts_with_all = ["action", "connection", "no_browser", "authority", "rest"])]
    demo: bool,
    #[command(flatten)]
    servers: Servers,
}

#[derive(Clone, Copy, PartialEq)]
enum Action {
    /// Print a URL and a code, wait until they are confirmed, and keep the login.
    Login,
    /// Have fal forget the login, and remove it from this machine.
    Logout,
    /// Find the login, renew it if it is due, and say which account it acts for.
    Status,
}

impl FromStr for Action {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "login" => Ok(Self::Login),
            "logout" => Ok(Self::Logout),
            "status" => Ok(Self::Status),
            _ => Err("it is login, logout or status"),
        }
    }
}

/// Other servers than fal's own.
#[derive(Args)]
struct Servers {
    /// A server in place of https://auth.fal.ai and https://fal.ai, for tests
    #[arg(long, value_name = "URL")]
    authority: Option<String>,
    /// A server in place of https://rest.alpha.fal.ai, for tests
    #[arg(long, value_name = "URL")]
    rest: Option<String>,
}

impl Servers {
    fn login(&self) -> Result<DeviceLogin, BoxError> {
        let login = DeviceLogin::new();
        Ok(match &self.authority {
            Some(url) => login.authority(url)?.website(url)?,
            None => login,
        })
    }

    fn source(&self) -> Result<LoginSource, BoxError> {
        let mut source = LoginSource::new();
        if let Some(url) = &self.authority {
            source = source.authority(url)?;
        }
        if let Some(url) = &self.rest {
            source = source.rest(url)?;
        }
        Ok(source)
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let code = terminal::run(|arguments| async {
        tokio::select! {
            done = run(arguments) => done,
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                Err("interrupted: see what was done with `status`".into())
            }
        }
    })
    .await;
    // A renewal or a logout that has begun is carried out, or the login could be lost.
    settled().await;
    code
}

async fn run(arguments: Arguments) -> Result<(), BoxError> {
    if arguments.demo {
        return demo().await;
    }
    let Arguments { action, connection, no_browser, servers, .. } = arguments;
    if action != Action::Login && (connection.is_some() || no_browser) {
        return Err("--connection and --no-browser belong to login".into());
    }
    match action {
        Action::Login => login(servers.login()?, connection, no_browser).await,
        Action::Logout => logout(&servers.login()?).await,
        Action::Status => status(&servers.source()?, ProfileSource::new().team().await?).await,
    }
}

async fn login(mut login: DeviceLogin, connection: Option<Connection>, no_browser: bool) -> Result<(), BoxError> {
    if let Some(connection) = connection {
        login = login.connection(connection);
    }
    let pending = login.start().await?;
    println!("Open this URL in a browser, on any machine:\n\n  {}\n", pending.url());
    println!("It has to show this code: {}", pending.user_code());
    if !no_browser {
        open(pending.url());
    }
    wait(pending).await?;
    println!("You are logged in.");
    Ok(())
}

/// Waits, and shows on a terminal that it does.
async fn wait(pending: PendingLogin) -> Result<(), BoxError> {
    let ends_at = tokio::time::Instant::now() + pending.time_left();
    let _line = stderr().is_terminal().then(|| LiveLine);
    let mut every_second = tokio::time::interval(Duration::from_secs(1));
    let mut waiting = std::pin::pin!(pending.wait());
    loop {
        tokio::select! {
            done = &mut waiting => return Ok(done?),
            now = every_second.tick() => if _line.is_some() {
                let left = ends_at.saturating_duration_since(now).as_secs();
                eprint!("\rWaiting for you to confirm it: {}:{:02} left ", left / 60, left % 60);
                stderr().flush()?;
            },
        }
    }
}

/// The line that is written again and again. It is gone when this is dropped, before anything else is printed.
struct LiveLine;

impl Drop for LiveLine {
    fn drop(&mut self) {
        eprint!("\r\x1b[K");
    }
}

/// Opens a URL in the browser of this system. If there is none, the user has read the URL.
fn open(url: &str) {
    let (program, first): (&str, &[&str]) = if cfg!(windows) {
        ("rundll32", &["url.dll,FileProtocolHandler"])
    } else if cfg!(target_os = "macos") {
        ("open", &[])
    } else {
        ("xdg-open", &[])
    };
    let mut browser = Command::new(program);
    browser.args(first).arg(url).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _ = browser.spawn();
}

async fn logout(login: &DeviceLogin) -> Result<(), BoxError> {
    let done = if login.logout().await? { "You are logged out." } else { "You were not logged in." };
    println!("{done}");
    Ok(())
}

async fn status(source: &LoginSource, team: Option<String>) -> Result<(), BoxError> {
    let credential = source.load().await?.ok_or("nobody is logged in: run this example with `login`")?;
    println!("You are logged in: {}", Printable(source.name()));
    match (credential.account(), team) {
        (Some(account), Some(team)) => println!("Account: {}, which is {account}", Printable(&team)),
        _ => println!("Account: the personal one, as none was chosen with `fal account set`"),
    }
    if let Some(minutes) = minutes_left(&credential) {
        println!("The token is good for {minutes} min, and is renewed before that.");
    }
    stdout().flush()?;
    Ok(())
}

fn minutes_left(credential: &Credential) -> Option<u64> {
    Some(credential.expires_at()?.duration_since(SystemTime::now()).ok()?.as_secs() / 60)
}

/// All of it against a server that confirms each login by itself after a moment.
async fn demo() -> Result<(), BoxError> {
    let server = MockAuthorization::start().await?;
    server.set_device_code(Duration::from_secs(1), Duration::from_secs(60));
    server.confirm_after(2);
    server.add_team("demo-team", "user-id-of-the-demo-team");
    let home = Home::new()?;

    println!("$ login --connection github");
    let device_login = DeviceLogin::new().home(&home.0).authority(server.url())?.website(server.url())?;
    login(device_login.clone(), Some(Connection::GitHub), true).await?;

    println!("\n$ fal account set demo-team");
    let config = home.0.join("config.toml");
    std::fs::write(&config, "[__internal__]\nteam = \"demo-team\"\n")?;

    println!("\n$ login status");
    let source = LoginSource::new().home(&home.0).config(&config).authority(server.url())?.rest(server.url())?;
    status(&source, ProfileSource::new().path(&config).team().await?).await?;
    println!("(Its token was renewed {} time: the login itself leaves none.)", server.refreshes());

    println!("\n$ login logout");
    logout(&device_login).await
}

/// A directory for the demonstration, which is removed with this.
struct Home(PathBuf);

impl Home {
    fn new() -> std::io::Result<Self> {
        let home = std::env::temp_dir().join(format!("tower-fal-login-{}", std::process::id()));
        std::fs::create_dir(&home)?;
        Ok(Self(home))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
