use std::{
    ffi::OsString,
    fmt,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use zeroize::Zeroizing;

use super::{
    CredentialSource, FileSource,
    variables::{KeyVariables, shown},
};
use crate::{
    credential::{Credential, has_quote_at_an_end, may_be_credential},
    error::SourceError,
    events,
};

/// The environment variables that you choose.
///
/// | constructor | variable | holds |
/// |---|---|---|
/// | [`key`](Self::key) | `FAL_KEY` | `id:secret` |
/// | [`pair`](Self::pair) | `FAL_KEY_ID` and `FAL_KEY_SECRET` | the two halves |
/// | [`file`](Self::file) | `FAL_KEY_FILE` | the path of a [file with the key](FileSource) |
/// | [`all`](Self::all) | these three, in this order | |
///
/// A variable that is unset, empty or blank is skipped. A variable that holds something else than a credential is an
/// error, and so is half a pair: the source never takes a later variable in place of a broken one.
///
/// # What "reload from the environment" means
/// The environment of a running process does not change: a new value in a pod's spec or a unit file only reaches a
/// *new* process. So a store on `key` or `pair` never polls, and a reload returns what was there at the start. The
/// *file* that `FAL_KEY_FILE` names can rotate in place: the variable is read once, and the file every 5 s. If a key
/// in a variable stands before such a file, this is logged as a warning, with the `tracing` feature.
///
/// Source of the names: fal's own clients read `FAL_KEY`, `FAL_KEY_ID` and `FAL_KEY_SECRET`. `FAL_KEY_FILE` is this
/// crate's own; many container images use the suffix `_FILE` in this way.
///
/// ```
/// use tower_fal::source::{CredentialSource, EnvSource};
///
/// # tokio_test::block_on(async {
/// // The test passes its own variables, so it does not change the process's environment.
/// let source = EnvSource::all().environment(|name| (name == "FAL_KEY").then(|| "id:secret".into()));
/// let credential = source.load().await?.unwrap();
/// assert_eq!(credential.source(), Some("env:FAL_KEY"));
/// # Ok::<(), tower_fal::error::SourceError>(())
/// # }).unwrap();
/// ```
#[derive(Clone)]
pub struct EnvSource {
    name: Arc<str>,
    parts: Vec<Part>,
    environment: Arc<dyn Fn(&str) -> Option<OsString> + Send + Sync>,
    file: OnceLock<FileSource>,
    warned: Arc<AtomicBool>,
}

#[derive(Clone)]
enum Part {
    Key(KeyVariables),
    /// The variable with the path of a file.
    File(String),
}

/// What was found in the environment.
enum Found<'a> {
    Credential(Credential),
    File(&'a FileSource),
}

impl EnvSource {
    /// `FAL_KEY`.
    #[must_use]
    pub fn key() -> Self {
        Self::new(vec![Part::Key(KeyVariables::whole())])
    }

    /// `FAL_KEY_ID` and `FAL_KEY_SECRET`.
    #[must_use]
    pub fn pair() -> Self {
        Self::new(vec![Part::Key(KeyVariables::halves())])
    }

    /// The file that `FAL_KEY_FILE` names.
    #[must_use]
    pub fn file() -> Self {
        Self::file_from("FAL_KEY_FILE")
    }

    /// `FAL_KEY`, else `FAL_KEY_ID` and `FAL_KEY_SECRET`, else the file that `FAL_KEY_FILE` names.
    #[must_use]
    pub fn all() -> Self {
        Self::new(vec![
            Part::Key(KeyVariables::whole()),
            Part::Key(KeyVariables::halves()),
            Part::File("FAL_KEY_FILE".into()),
        ])
    }

    /// A whole key, in a variable of another name.
    #[must_use]
    pub fn key_from(variable: impl Into<String>) -> Self {
        Self::new(vec![Part::Key(KeyVariables::Whole(variable.into()))])
    }

    /// The two halves of a key, in variables of other names.
    #[must_use]
    pub fn pair_from(id_variable: impl Into<String>, secret_variable: impl Into<String>) -> Self {
        Self::new(vec![Part::Key(KeyVariables::Halves { id: id_variable.into(), secret: secret_variable.into() })])
    }

    /// The path of a key file, in a variable of another name.
    #[must_use]
    pub fn file_from(variable: impl Into<String>) -> Self {
        Self::new(vec![Part::File(variable.into())])
    }

    fn new(parts: Vec<Part>) -> Self {
        let names: Vec<_> = parts.iter().map(Part::to_string).collect();
        Self {
            name: format!("env:{}", names.join(",")).into(),
            parts,
            environment: Arc::new(|name| std::env::var_os(name)),
            file: OnceLock::new(),
            warned: Arc::default(),
        }
    }

    /// The function that returns the value of a variable. Default: it reads the process's environment.
    #[must_use]
    pub fn environment(mut self, lookup: impl Fn(&str) -> Option<OsString> + Send + Sync + 'static) -> Self {
        self.environment = Arc::new(lookup);
        self
    }

    /// The credential, without a runtime. It refuses a file, which a store without a driver could never read again.
    pub(crate) fn load_fixed(&self) -> Result<Option<Credential>, SourceError> {
        match self.find()? {
            None => Ok(None),
            Some(Found::Credential(credential)) => {
                self.report_shadowed(&credential);
                Ok(Some(credential))
            }
            Some(Found::File(file)) => Err(SourceError::invalid(
                self.name.clone(),
                format!(
                    "the key is in {}, and only a store with a driver reads a file again: \
                     use `CredentialStore::builder(EnvSource::file()).build().await`",
                    file.name(),
                ),
            )),
        }
    }

    fn find(&self) -> Result<Option<Found<'_>>, SourceError> {
        for part in &self.parts {
            let name = format!("env:{part}");
            match part {
                Part::Key(variables) => {
                    if let Some(credential) = variables.load(&name, |variable| self.value(variable))? {
                        return Ok(Some(Found::Credential(credential)));
                    }
                }
                Part::File(variable) => {
                    if let Some(path) = (self.environment)(variable).and_then(path) {
                        refuse_no_path(name, variable, &path)?;
                        return Ok(Some(Found::File(self.file.get_or_init(|| FileSource::new(path)))));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Warns once if a later variable names a file: a rotation of that file would have no effect.
    fn report_shadowed(&self, credential: &Credential) {
        let is_set = |part: &&Part| matches!(part, Part::File(variable) if (self.environment)(variable).and_then(path).is_some());
        if let Some(file) = self.parts.iter().find(is_set)
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            let source = credential.source().unwrap_or(&self.name);
            events::shadowed(source, credential.key_id(), &format!("env:{file}"));
        }
    }

    /// In a buffer that is wiped when it is dropped.
    fn value(&self, variable: &str) -> Option<Zeroizing<Vec<u8>>> {
        (self.environment)(variable).map(|value| Zeroizing::new(value.into_encoded_bytes()))
    }
}

impl CredentialSource for EnvSource {
    fn name(&self) -> &str {
        &self.name
    }

    async fn load(&self) -> Result<Option<Credential>, SourceError> {
        match self.find()? {
            Some(Found::File(file)) => file.load().await,
            _ => self.load_fixed(),
        }
    }

    fn poll_interval(&self) -> Option<Duration> {
        match self.find() {
            Ok(Some(Found::File(file))) => file.poll_interval(),
            _ => None,
        }
    }

    fn watched_paths(&self) -> Vec<PathBuf> {
        match self.find() {
            Ok(Some(Found::File(file))) => file.watched_paths(),
            _ => Vec::new(),
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(variables) => variables.fmt(f),
            Self::File(variable) => f.write_str(shown(variable)),
        }
    }
}

impl fmt::Debug for EnvSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EnvSource").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The path becomes part of a name that is logged. A key that was put there by mistake must not.
fn refuse_no_path(source: String, variable: &str, path: &Path) -> Result<(), SourceError> {
    let hint = match path.to_str() {
        Some(path) if has_quote_at_an_end(path) => "is in quotes: remove the quotes around the path",
        _ if may_be_credential(path.as_os_str().as_encoded_bytes()) => {
            "must hold the path of a file, and this may be a key; if it is a path, write `./` in front of it"
        }
        _ => return Ok(()),
    };
    Err(SourceError::invalid(source, format!("{} {hint}", shown(variable))))
}

fn path(value: OsString) -> Option<PathBuf> {
    match value.to_str() {
        Some(text) if text.trim_ascii().is_empty() => None,
        Some(text) => Some(text.trim_ascii().into()),
        None => Some(value.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{SourceErrorKind, report};

    fn with(source: EnvSource, variables: &'static [(&'static str, &'static str)]) -> EnvSource {
        source.environment(move |name| {
            variables.iter().find(|(variable, _)| *variable == name).map(|(_, value)| OsString::from(value))
        })
    }

    async fn loaded(source: EnvSource, variables: &'static [(&'static str, &'static str)]) -> (String, String) {
        let credential = with(source, variables).load().await.unwrap().unwrap();
        (credential.header().to_str().unwrap().to_owned(), credential.source().unwrap().to_owned())
    }

    #[tokio::test]
    async fn the_key_comes_before_the_pair_and_the_pair_before_the_file() {
        const KEY: (&str, &str) = ("FAL_KEY", "a:1\n");
        const ID: (&str, &str) = ("FAL_KEY_ID", "b");
        const SECRET: (&str, &str) = ("FAL_KEY_SECRET", "2");
        const FILE: (&str, &str) = ("FAL_KEY_FILE", " /nowhere/at/all\n");
        let found = loaded(EnvSource::all(), &[FILE, SECRET, ID, KEY]).await;
        assert_eq!(found, ("Key a:1".into(), "env:FAL_KEY".into()));
        let found = loaded(EnvSource::all(), &[FILE, SECRET, ID]).await;
        assert_eq!(found, ("Key b:2".into(), "env:FAL_KEY_ID+FAL_KEY_SECRET".into()));
        let error = with(EnvSource::all(), &[FILE]).load().await.unwrap_err();
        assert_eq!(error.source_name(), "file:/nowhere/at/all");
    }

    #[tokio::test]
    async fn each_part_reads_its_own_variables_only() {
        const OTHERS: &[(&str, &str)] = &[("FAL_KEY_ID", "b"), ("FAL_KEY_SECRET", "2")];
        assert!(with(EnvSource::key(), OTHERS).load().await.unwrap().is_none());
        assert!(with(EnvSource::file(), OTHERS).load().await.unwrap().is_none());
        assert!(with(EnvSource::pair(), &[("FAL_KEY", "a:1")]).load().await.unwrap().is_none());
        let found = loaded(EnvSource::key_from("ACME"), &[("ACME", "a:1")]).await;
        assert_eq!(found, ("Key a:1".into(), "env:ACME".into()));
        let found = loaded(EnvSource::pair_from("I", "S"), &[("I", "a"), ("S", "1")]).await;
        assert_eq!(found, ("Key a:1".into(), "env:I+S".into()));
        assert!(with(EnvSource::file_from("F"), &[("F", "/nowhere/at/all")]).load().await.is_err());
    }

    #[tokio::test]
    async fn empty_and_blank_count_as_unset() {
        for source in [EnvSource::all(), EnvSource::key(), EnvSource::pair(), EnvSource::file()] {
            let variables =
                &[("FAL_KEY", ""), ("FAL_KEY_ID", " "), ("FAL_KEY_SECRET", "\n"), ("FAL_KEY_FILE", "\u{20}\t")];
            assert!(with(source, variables).load().await.unwrap().is_none());
        }
    }

    #[tokio::test]
    async fn half_a_pair_is_an_error_that_names_the_missing_half() {
        let error = with(EnvSource::all(), &[("FAL_KEY_ID", "a")]).load().await.unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::NotFound);
        assert!(error.to_string().contains("FAL_KEY_ID is set and FAL_KEY_SECRET is not"), "{error}");
        let error = with(EnvSource::all(), &[("FAL_KEY_SECRET", "1")]).load().await.unwrap_err();
        assert!(error.to_string().contains("FAL_KEY_SECRET is set and FAL_KEY_ID is not"), "{error}");
        assert!(with(EnvSource::all(), &[("FAL_KEY", "a:1"), ("FAL_KEY_ID", "b")]).load().await.is_ok());
    }

    #[tokio::test]
    async fn a_broken_key_ends_the_search() {
        let variables = &[("FAL_KEY", "hush"), ("FAL_KEY_ID", "b"), ("FAL_KEY_SECRET", "2")];
        let error = with(EnvSource::all(), variables).load().await.unwrap_err();
        assert!(report(&error).starts_with("env:FAL_KEY: holds no credential: the key has no `:`"), "{error}");
        assert!(!report(&error).contains("hush"));
    }

    #[tokio::test]
    async fn a_key_in_place_of_a_path_is_refused_and_not_shown() {
        let error = with(EnvSource::all(), &[("FAL_KEY_FILE", "id:hush-hush")]).load().await.unwrap_err();
        assert!(error.to_string().contains("FAL_KEY_FILE must hold the path of a file"), "{error}");
        assert!(!format!("{error} {error:?}").contains("hush"));
        for quoted in ["\"/run/hush\"", "'/run/hush'", "\"id:hush\""] {
            let source = EnvSource::file().environment(move |_| Some(quoted.into()));
            let error = source.load().await.unwrap_err();
            let said = "env:FAL_KEY_FILE: FAL_KEY_FILE is in quotes: remove the quotes around the path";
            assert_eq!(report(&error), said);
        }
        assert!(
            with(EnvSource::file(), &[("FAL_KEY_FILE", "C:\\key")])
                .load()
                .await
                .is_err_and(|error| { error.kind() == SourceErrorKind::NotFound })
        );
    }

    #[tokio::test]
    async fn a_key_in_place_of_a_variable_name_is_not_shown() {
        let source = with(EnvSource::key_from("id:hush-hush"), &[]);
        assert!(!format!("{source:?} {}", source.name()).contains("hush"));
        let source = with(EnvSource::pair_from("a b", "hush-hush"), &[("a b", "id")]);
        let error = source.load().await.unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hush"));
    }

    #[test]
    fn only_a_file_is_polled() {
        assert_eq!(with(EnvSource::all(), &[("FAL_KEY", "a:1")]).poll_interval(), None);
        let file = with(EnvSource::all(), &[("FAL_KEY_FILE", "/key")]);
        assert_eq!(file.poll_interval(), Some(Duration::from_secs(5)));
        assert_eq!(file.watched_paths(), [PathBuf::from("/key")]);
    }

    #[test]
    fn a_fixed_load_refuses_a_file_and_names_the_builder() {
        let fixed = |variables| with(EnvSource::all(), variables).load_fixed();
        assert_eq!(fixed(&[("FAL_KEY", "a:1")]).unwrap().unwrap().header(), "Key a:1");
        assert!(fixed(&[]).unwrap().is_none());
        let error = fixed(&[("FAL_KEY_FILE", "/key")]).unwrap_err();
        assert!(error.to_string().contains("CredentialStore::builder(EnvSource::file())"), "{error}");
    }

    #[test]
    fn debug_shows_the_names_of_the_variables() {
        let shown = format!("{:?}", with(EnvSource::all(), &[("FAL_KEY", "id:hush")]));
        assert_eq!(shown, r#"EnvSource { name: "env:FAL_KEY,FAL_KEY_ID+FAL_KEY_SECRET,FAL_KEY_FILE", .. }"#);
    }
}
