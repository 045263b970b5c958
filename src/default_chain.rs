//! Where fal's own tools look for a credential, as one chain. It stands above all sources, so that they need not know
//! each other.

use std::{ffi::OsString, time::Duration};

use crate::{
    CredentialStore, SourceError,
    error::SourceErrorKind,
    source::{ChainSource, EnvSource},
};

/// A profile that is gone gives way to what stands behind it after this time. A file that is being replaced is back by
/// then. The store looks 1 s after it has missed a credential and again 2 s later, so the change shows within 12 s.
const FALL_THROUGH_AFTER: Duration = Duration::from_secs(2);

impl ChainSource {
    /// Where fal's own tools look for a credential, in their order. On a developer's machine, a program finds the one
    /// that `fal` finds there.
    ///
    /// 1. If `FAL_FORCE_AUTH_BY_USER` is exactly `1`, all keys are skipped, and only the login is left.
    /// 2. The key in `FAL_KEY`.
    /// 3. The key of the profile in `~/.fal/config.toml`: [`ProfileSource`](crate::source::ProfileSource). Only with the
    ///    feature `profile`.
    /// 4. The key in `FAL_KEY_ID` and `FAL_KEY_SECRET`.
    /// 5. The key in the file that `FAL_KEY_FILE` names.
    /// 6. The login that `fal auth login` has made: [`LoginSource`](crate::login::LoginSource). Only with the feature
    ///    `login`.
    ///
    /// What is absent is skipped. What is there and broken is an error that names its place, and ends the search: a
    /// mistake in a key must not let another account pay. A profile that is removed while the program runs gives way to
    /// what stands behind it after 2 s, as in a chain that [falls through](Self::fall_through_after).
    ///
    /// [`CredentialStore::from_default`] makes a store of it. Without the features `profile` and `login`, it is
    /// [`EnvSource::all`] with the errors of a chain. With `FAL_FORCE_AUTH_BY_USER=1` and without the feature `login`, it
    /// is an error.
    ///
    /// ```
    /// use tower_fal::source::{ChainSource, FileSource};
    ///
    /// // The mounted file of a deployment, else what a developer has.
    /// let mounted = FileSource::new("/run/secrets/fal/key").if_present();
    /// let source = ChainSource::new().push(mounted).push(ChainSource::fal_default());
    /// # let _ = source;
    /// ```
    ///
    /// # What differs
    /// fal's official clients do not agree with each other. Where they differ, this chain follows `fal`, and refuses
    /// what would be a silent mistake:
    ///
    /// | | here | `fal` 1.83.0: SDK and CLI | `fal_client` 1.0.3 | `@fal-ai/client` 1.10.1 |
    /// |---|---|---|---|---|
    /// | keys, in this order | `FAL_KEY`, profile, pair, `FAL_KEY_FILE` | `FAL_KEY`, profile, Colab's secret, pair | `FAL_KEY`, pair, Colab's secret | `FAL_KEY`, pair |
    /// | then the login | yes, with its account | yes, with its account | yes, always the personal account | no |
    /// | `FAL_FORCE_AUTH_BY_USER` | skips all keys if it is `1` | the same | the same | not read |
    /// | an empty `FAL_KEY` | is unset | is unset | is unset | hides the pair; nothing is sent |
    /// | an empty half of the pair | is unset | is sent | is unset | an empty secret is sent |
    /// | half a pair | is an error | is skipped | is skipped | an id without a secret is sent |
    /// | a `FAL_KEY` without `:` | is an error | is skipped, with a notice, and so are all keys | is sent | is sent |
    /// | blanks and line breaks at the ends | are trimmed | are sent | are sent | are sent |
    /// | a named profile that is missing | is an error | is skipped | profiles are not read | profiles are not read |
    /// | a profile for another environment | is an error | its host is called | | |
    /// | later changes | are followed | are not | are not | the variables are read again for each attempt |
    ///
    /// `FAL_KEY_FILE` is this crate's own. A secret of Google Colab is not looked for.
    ///
    /// Source: `fal` 1.83.0 (`auth/__init__.py`, `sdk.py`), `fal_client` 1.0.3 (`auth.py`), `@fal-ai/client` 1.10.1
    /// (`config.ts`).
    #[must_use]
    pub fn fal_default() -> Self {
        default_chain(|name| std::env::var_os(name))
    }
}

impl CredentialStore {
    /// A store that follows the credential which fal's own tools would use: [`ChainSource::fal_default`], which lists
    /// where that is looked for.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), tower_fal::SourceError> {
    /// let store = tower_fal::CredentialStore::from_default().await?;
    /// println!("found in {}", store.load().source());
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`build`](crate::store::CredentialStoreBuilder::build). When there is no credential in any of the places, the
    /// error names the two easiest ways to get one.
    ///
    /// # Panics
    /// As [`build`](crate::store::CredentialStoreBuilder::build).
    pub async fn from_default() -> Result<Self, SourceError> {
        let store = Self::builder(ChainSource::fal_default()).build().await;
        store.map_err(|error| match error.kind() {
            SourceErrorKind::NotFound if std::error::Error::source(&error).is_none() => {
                let is_forced = is_user_forced(&|name: &str| std::env::var_os(name));
                SourceError::not_found(error.source_name(), what_to_do(is_forced))
            }
            _ => error,
        })
    }
}

fn default_chain(environment: impl Fn(&str) -> Option<OsString> + Clone + Send + Sync + 'static) -> ChainSource {
    let chain = ChainSource::new().fall_through_after(FALL_THROUGH_AFTER);
    let is_forced = is_user_forced(&environment);
    let chain = if is_forced { chain } else { with_keys(chain, environment.clone()) };
    with_login(chain, environment, is_forced)
}

/// Source: `fal` 1.83.0 (`auth/__init__.py`); `fal_client` 1.0.3 (`auth.py`). No other value has this effect.
fn is_user_forced(environment: &impl Fn(&str) -> Option<OsString>) -> bool {
    environment("FAL_FORCE_AUTH_BY_USER").is_some_and(|value| value == "1")
}

fn with_keys(
    chain: ChainSource,
    environment: impl Fn(&str) -> Option<OsString> + Clone + Send + Sync + 'static,
) -> ChainSource {
    let chain = chain.push(EnvSource::key().environment(environment.clone()));
    #[cfg(feature = "profile")]
    let chain = chain.push(crate::source::ProfileSource::new().environment(environment.clone()));
    chain.push(EnvSource::pair().environment(environment.clone())).push(EnvSource::file().environment(environment))
}

#[cfg(feature = "login")]
fn with_login(
    chain: ChainSource,
    environment: impl Fn(&str) -> Option<OsString> + Clone + Send + Sync + 'static,
    _is_forced: bool,
) -> ChainSource {
    chain.push(crate::login::LoginSource::new().environment(environment))
}

#[cfg(not(feature = "login"))]
fn with_login<E>(chain: ChainSource, _environment: E, is_forced: bool) -> ChainSource {
    if is_forced { chain.push(no_login::NoLogin) } else { chain }
}

fn what_to_do(is_forced: bool) -> &'static str {
    if is_forced {
        "nobody is logged in, and FAL_FORCE_AUTH_BY_USER=1 skips all keys: run `fal auth login`, or unset it"
    } else if cfg!(feature = "login") {
        "there is no credential: set FAL_KEY to a key from fal.ai/dashboard/keys, or run `fal auth login`"
    } else {
        "there is no credential: set FAL_KEY to a key from fal.ai/dashboard/keys, or FAL_KEY_FILE to a file with one"
    }
}

#[cfg(not(feature = "login"))]
mod no_login {
    use crate::{Credential, SourceError, source::CredentialSource};

    /// The login that is asked for, where it was left out of the build.
    pub(super) struct NoLogin;

    impl CredentialSource for NoLogin {
        fn name(&self) -> &str {
            "login"
        }

        async fn load(&self) -> Result<Option<Credential>, SourceError> {
            let message = "FAL_FORCE_AUTH_BY_USER=1 asks for it, and this program is built without it: \
                           turn on the feature `login` of tower-fal, or unset the variable";
            Err(SourceError::not_found(self.name(), message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::report, source::CredentialSource as _};

    fn chain(variables: &'static [(&'static str, &'static str)]) -> ChainSource {
        let home = |name: &str| (name == "HOME" || name == "USERPROFILE").then(|| "/nowhere/at/all".into());
        default_chain(move |name| {
            let set = variables.iter().find(|(set, _)| *set == name).map(|(_, value)| value.into());
            set.or_else(|| home(name))
        })
    }

    async fn found(variables: &'static [(&'static str, &'static str)]) -> String {
        match chain(variables).load().await {
            Ok(Some(found)) => format!("{} from {}", found.header().to_str().unwrap(), found.source().unwrap()),
            Ok(None) => "none".to_owned(),
            Err(error) => report(&error),
        }
    }

    const KEY: (&str, &str) = ("FAL_KEY", "a:1");
    const ID: (&str, &str) = ("FAL_KEY_ID", "b");
    const SECRET: (&str, &str) = ("FAL_KEY_SECRET", "2");
    const FILE: (&str, &str) = ("FAL_KEY_FILE", "/nowhere/key");

    #[tokio::test]
    async fn keys_are_found_in_their_order() {
        assert_eq!(found(&[FILE, SECRET, ID, KEY]).await, "Key a:1 from env:FAL_KEY");
        assert_eq!(found(&[FILE, SECRET, ID]).await, "Key b:2 from env:FAL_KEY_ID+FAL_KEY_SECRET");
        let said = found(&[FILE]).await;
        assert!(
            said.contains("env:FAL_KEY_FILE failed") && said.contains("file:/nowhere/key: cannot be found"),
            "{said}"
        );
    }

    #[test]
    fn only_1_skips_the_keys() {
        for value in ["", "0", "true", "yes", "01", " 1", "1 "] {
            let variables = [("FAL_FORCE_AUTH_BY_USER", value)];
            let lookup = |name: &str| variables.iter().find(|(set, _)| *set == name).map(|(_, value)| value.into());
            assert!(!is_user_forced(&lookup), "{value:?}");
        }
        let forced = chain(&[("FAL_FORCE_AUTH_BY_USER", "1"), KEY, SECRET, ID, FILE]);
        assert!(!forced.name().contains("env:") && !forced.name().contains("profile"), "{}", forced.name());
    }

    #[tokio::test]
    async fn what_is_there_and_broken_ends_the_search() {
        let said = found(&[("FAL_KEY", "hush"), ID, SECRET]).await;
        assert!(said.contains("env:FAL_KEY failed") && said.contains("the key has no `:`"), "{said}");
        assert!(found(&[ID, FILE]).await.contains("FAL_KEY_ID is set and FAL_KEY_SECRET is not: set both"));
    }
    #[cfg(feature = "profile")]
    #[tokio::test(start_paused = true)]
    async fn a_profile_that_is_removed_gives_way_within_12_s() {
        let home = tempfile::tempdir().unwrap();
        let config = home.path().join("config.toml");
        std::fs::write(&config, "[__internal__]\nprofile = \"work\"\n[work]\nkey = \"w:3\"\n").unwrap();
        let path = config.clone().into_os_string();
        let chain = default_chain(move |name| match name {
            "FAL_CONFIG_PATH" => Some(path.clone()),
            "FAL_KEY_ID" => Some("b".into()),
            "FAL_KEY_SECRET" => Some("2".into()),
            _ => None,
        });
        let store = CredentialStore::builder(chain).build().await.unwrap();
        assert_eq!(store.load().credential().header(), "Key w:3");
        std::fs::write(&config, "[__internal__]\n[work]\nkey = \"w:3\"\n").unwrap();
        tokio::time::sleep(Duration::from_secs(12)).await;
        assert_eq!(store.load().credential().header(), "Key b:2");
    }
}
