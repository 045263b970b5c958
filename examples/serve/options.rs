use std::{net::SocketAddr, str::FromStr, time::Duration};

use axum::http::Uri;
use clap::Args;
use tower_fal::{error::BoxError, origin::FalOrigins};

/// The arguments of every server. Each example adds where its keys are.
#[derive(Args)]
#[command(after_help = "\
When the server is ready it prints one line, `listening on http://127.0.0.1:3000`. The log goes to
standard error. `/healthz` and `/readyz` are for probes. SIGTERM or ctrl-c starts the shutdown, and
a second one ends it at once.")]
pub(crate) struct Options {
    /// Use a fal inside this process, with keys of its own: it needs no key and no network
    #[arg(long)]
    pub(crate) demo: bool,
    /// Where to listen. With port 0 the system chooses a free port
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:3000")]
    pub(crate) listen: SocketAddr,
    /// A URL in place of https://fal.run. The key is sent there, so it must be https, or http on this machine
    #[arg(long, value_name = "URL", conflicts_with = "demo")]
    pub(crate) fal_run_url: Option<BaseUrl>,
    /// A URL in place of https://queue.fal.run
    #[arg(long, value_name = "URL", conflicts_with = "demo")]
    pub(crate) fal_queue_url: Option<BaseUrl>,
    /// How long a request may take until its answer begins
    // Shorter than the drain, so that a shutdown interrupts no request.
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true, default_value = "20")]
    pub(crate) request_timeout: Duration,
    /// How long to go on accepting connections after SIGTERM, while `/readyz` says 503
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true, default_value = "3")]
    pub(crate) drain_delay: Duration,
    /// How long open requests may take after that
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true, default_value = "25")]
    pub(crate) drain_timeout: Duration,
}

fn seconds(text: &str) -> Result<Duration, &'static str> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or("it must be a number of seconds")
}

/// A URL that stands for one of fal's. Only one that may see a key can be made.
#[derive(Clone)]
pub(crate) struct BaseUrl {
    /// Such as `https://gateway.example.com:8443`.
    pub(crate) origin: String,
    /// The origin and the path, without a slash at the end.
    pub(crate) url: String,
}

impl FromStr for BaseUrl {
    type Err = BoxError;

    fn from_str(text: &str) -> Result<Self, BoxError> {
        let url: Uri = text.parse().map_err(|_| "it is not a URL")?;
        let (Some(scheme), Some(authority), None) = (url.scheme(), url.authority(), url.query()) else {
            return Err("it must be like https://host/path".into());
        };
        let origin = format!("{scheme}://{authority}");
        // The policy refuses an origin to which the key would go in clear.
        let _ = FalOrigins::new().and(&origin)?;
        let url = format!("{origin}{}", url.path().trim_end_matches('/'));
        Ok(Self { origin, url })
    }
}
