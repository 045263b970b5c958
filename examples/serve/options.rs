use std::{net::SocketAddr, path::PathBuf, time::Duration};

/// What each of the examples says below what it says about itself.
pub(crate) const HELP: &str = "
  --demo                    against a fal in this process: no key, no network
  --listen ADDR             [127.0.0.1:3000; with port 0, a free one]
  --fal-run-url URL         in place of https://fal.run: https, or http on this machine; the key goes there
  --fal-queue-url URL       in place of https://queue.fal.run
  --request-timeout SECONDS until its answer begins, how long a request may take [20]
  --drain-delay SECONDS     after a SIGTERM, how long to go on while `/readyz` says 503 [3]
  --drain-timeout SECONDS   and then, how long what is open may take [25]
  --help                    this

Once it listens it prints one line, `listening on http://127.0.0.1:3000`; the log goes to standard error.
`/healthz` and `/readyz` are there for probes. SIGTERM or ctrl-c end it, a second one at once.
";

/// What is asked for on the command line.
pub(crate) struct Options {
    pub(crate) listen: SocketAddr,
    pub(crate) demo: bool,
    /// Where the keys are, if not in the environment.
    pub(crate) keys: Option<PathBuf>,
    pub(crate) run_url: Option<String>,
    pub(crate) queue_url: Option<String>,
    pub(crate) request_timeout: Duration,
    pub(crate) drain_delay: Duration,
    pub(crate) drain_timeout: Duration,
}

impl Options {
    /// `keys` is the name of the option that says where the keys are. `None` asks for help. An error shows nothing that
    /// may be a key.
    pub(crate) fn parse(arguments: impl Iterator<Item = String>, keys: &'static str) -> Result<Option<Self>, String> {
        let mut options = Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 3000)),
            demo: false,
            keys: None,
            run_url: None,
            queue_url: None,
            // Less than a drain, so that a shutdown cuts nothing short.
            request_timeout: Duration::from_secs(20),
            drain_delay: Duration::from_secs(3),
            drain_timeout: Duration::from_secs(25),
        };
        let mut arguments = arguments.zip(1..);
        while let Some((name, at)) = arguments.next() {
            let mut value = || arguments.next().map(|(value, _)| value).ok_or_else(|| format!("{name} needs a value"));
            let seconds = |value: String| {
                let seconds = value.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
                seconds.ok_or_else(|| format!("{name} needs a number of seconds"))
            };
            match name.as_str() {
                "--demo" => options.demo = true,
                "--listen" => {
                    let address = value()?.parse();
                    options.listen = address.map_err(|_| "--listen needs an IP address and a port".to_owned())?;
                }
                "--fal-run-url" => options.run_url = Some(value()?),
                "--fal-queue-url" => options.queue_url = Some(value()?),
                "--request-timeout" => options.request_timeout = seconds(value()?)?,
                "--drain-delay" => options.drain_delay = seconds(value()?)?,
                "--drain-timeout" => options.drain_timeout = seconds(value()?)?,
                "--help" | "-h" => return Ok(None),
                _ if name == keys => options.keys = Some(value()?.into()),
                _ => return Err(format!("argument {at} is no option; the value of one is an argument of its own")),
            }
        }
        if options.demo && (options.keys.is_some() || options.run_url.is_some() || options.queue_url.is_some()) {
            return Err(format!("--demo brings its own fal and its own keys: no {keys} and no URLs beside it"));
        }
        Ok(Some(options))
    }
}
