use std::{net::SocketAddr, num::NonZeroUsize, str::FromStr, time::Duration};

use clap::Args;

use crate::terminal::BaseUrl;

/// The arguments of every server. Each example adds where its keys are.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) listener: Listener,
    /// A name of this server, such as that of a reverse proxy on this machine. It is needed only for a server that
    /// listens on a loopback address, which refuses requests for other hosts than this machine. It may be repeated
    #[arg(long, value_name = "NAME")]
    pub(crate) host: Vec<String>,
    /// How many requests may be under way. The others are answered with 503 and `Retry-After`
    #[arg(long, value_name = "N", default_value = "128")]
    pub(crate) max_requests: NonZeroUsize,
    /// How long a request may take until its answer begins
    // Shorter than the drain, so that a shutdown interrupts no request.
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true, default_value = "20")]
    pub(crate) request_timeout: Duration,
}

/// The arguments that concern connections and the process.
#[derive(Args)]
#[command(after_help = "\
When the server is ready it prints one line, `listening on http://127.0.0.1:3000`. The log goes to
standard error. `/healthz` and `/readyz` are for probes. With an address for --admin it prints a
second line, `admin on http://127.0.0.1:3001`. SIGTERM or ctrl-c starts the shutdown, a second one
ends it.")]
pub(crate) struct Listener {
    /// Use a fal inside this process, with keys of its own: it needs no key and no network
    #[arg(long)]
    pub(crate) demo: bool,
    /// Where to listen. With port 0 the system chooses a free port
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:3000")]
    pub(crate) listen: SocketAddr,
    /// Where to listen for those who run the server: `/readyz` with key ids and file names, and `/metrics` for
    /// Prometheus. With `off` there is no such listener
    #[arg(long, value_name = "ADDR", default_value = "off")]
    pub(crate) admin: Admin,
    /// How many connections may be open. The others wait
    #[arg(long, value_name = "N", default_value = "1000")]
    pub(crate) max_connections: NonZeroUsize,
    /// How long a new connection may take until its first request is complete, without the body
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true, default_value = "10")]
    pub(crate) header_timeout: Duration,
    /// How long a connection may stay without a request, and an answer may wait until the client reads it
    // A load balancer in front must be the first to close a connection. Those of the clouds do so after 60 s.
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true, default_value = "75")]
    pub(crate) idle_timeout: Duration,
    /// How long to go on accepting connections after SIGTERM, while `/readyz` says 503
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true, default_value = "3")]
    pub(crate) drain_delay: Duration,
    /// How long open requests may take after that
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true, default_value = "25")]
    pub(crate) drain_timeout: Duration,
}

/// An address, or none.
#[derive(Clone, Copy)]
pub(crate) struct Admin(pub(crate) Option<SocketAddr>);

impl FromStr for Admin {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        match text {
            "off" => Ok(Self(None)),
            text => {
                text.parse().map(|address| Self(Some(address))).map_err(|_| "it must be like 127.0.0.1:3001, or `off`")
            }
        }
    }
}

/// Where fal is, for the servers that call its models.
#[derive(Args, Default)]
pub(crate) struct FalUrls {
    /// A URL in place of https://fal.run. The key is sent there, so it must be https, or http on this machine
    #[arg(long, value_name = "URL", conflicts_with = "demo")]
    pub(crate) fal_run_url: Option<BaseUrl>,
    /// A URL in place of https://queue.fal.run
    #[arg(long, value_name = "URL", conflicts_with = "demo")]
    pub(crate) fal_queue_url: Option<BaseUrl>,
}

pub(crate) fn seconds(text: &str) -> Result<Duration, &'static str> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or("it must be a number of seconds")
}
