//! The choice that `stream` and `websocket` give you: a fal in this process, or the real one.

use std::error::Error;

use clap::{ArgAction, Args};
use tower_fal::{CredentialStore, source::EnvSource};

use crate::terminal::Printable;

/// Where the example runs its app.
#[derive(Args)]
pub(crate) struct Target {
    /// Use a fal inside this process: it needs no key and no network. This is the default
    #[arg(long, conflicts_with = "live")]
    demo: bool,
    /// Run APP with INPUT, which is JSON, at the real fal, which bills it. This needs FAL_KEY, or FAL_KEY_ID and
    /// FAL_KEY_SECRET, or FAL_KEY_FILE
    #[arg(long, action = ArgAction::Set, num_args = 2, value_names = ["APP", "INPUT"])]
    live: Option<Vec<String>>,
}

/// What to run at the real fal.
pub(crate) struct Live {
    pub(crate) store: CredentialStore,
    pub(crate) app: String,
    pub(crate) input: String,
}

impl Target {
    /// `None` asks for the demonstration.
    pub(crate) async fn live(self) -> Result<Option<Live>, Box<dyn Error>> {
        let Some([app, input]) = self.live.as_deref() else { return Ok(None) };
        let store = CredentialStore::builder(EnvSource::all()).build().await?;
        let credential = format!("{:?} from {}", store.load().credential(), store.status().source);
        println!("credential: {}", Printable(&credential));
        Ok(Some(Live { store, app: app.clone(), input: input.clone() }))
    }
}
