use std::{
    env,
    ffi::OsString,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{CredentialSource, FileSource, file::Content};
use crate::{
    credential::{Credential, may_be_credential, trim},
    error::SourceError,
};

/// The table in which fal's tools keep what belongs to no profile. It is no profile itself.
const INTERNAL: &str = "__internal__";

/// The hosts of fal's API whose models run on `fal.run`. A profile with any other one is for another environment.
///
/// Source: `fal` 1.83.0 (`config.py`, `flags.py`), which makes the other hosts from this one.
const HOSTS: [&str; 2] = ["api.alpha.fal.ai", "api.fal.ai"];

/// An error lists no more profiles than these.
const MOST_NAMES: usize = 20;

/// The key of a profile in the configuration of fal's own tools, `~/.fal/config.toml`.
///
/// ```toml
/// [__internal__]
/// profile = "work"
///
/// [work]
/// key = "id:secret"
/// ```
///
/// # Which profile
/// 1. The one that is [named](Self::named) in code.
/// 2. The one that `FAL_PROFILE` names. An empty variable counts as unset.
/// 3. The one that fal's tools have stored, `__internal__.profile`.
///
/// A profile that was named in one of the first two ways and does not exist is an error, which lists those that do. A
/// stored one that does not exist is none, as for fal's tools. A profile without a key has no credential (`Ok(None)`):
/// it uses the login. A profile with the `host` of another environment of fal is refused, because its key would be sent
/// to `fal.run`.
///
/// # Which file
/// The one at [`path`](Self::path), else the one that `FAL_CONFIG_PATH` names, else `~/.fal/config.toml`, whatever
/// `FAL_HOME_DIR` says. A `~` at the start is the home directory, and an empty variable means that there is no
/// configuration. A missing file has no profiles; only one at a path that was named in code is an error.
///
/// It is read, polled and watched like any [file](FileSource): every 5 s, at most 64 KiB, and as soon as nothing writes
/// to it. The content is wiped. What the TOML parser copies while it reads (a key in which something is escaped, and a
/// file with an error) is not.
///
/// Source: `fal` 1.83.0 (`config.py`).
///
/// ```
/// use tower_fal::source::ProfileSource;
///
/// let chosen = ProfileSource::new();
/// let work = ProfileSource::named("work").path("/etc/fal/config.toml");
/// # let _ = (chosen, work);
/// ```
#[derive(Clone)]
pub struct ProfileSource {
    profile: Option<String>,
    path: Option<PathBuf>,
    environment: Environment,
    every: Option<Duration>,
    place: Place,
}

type Environment = Arc<dyn Fn(&str) -> Option<OsString> + Send + Sync>;

/// Where the configuration is, which depends on the other fields.
#[derive(Clone)]
struct Place {
    name: Arc<str>,
    /// `None` if there is no configuration.
    file: Option<FileSource>,
}

/// A profile that was named, and by whom.
struct Named {
    profile: String,
    by: &'static str,
}

impl ProfileSource {
    /// The profile that fal's own tools would use.
    #[must_use]
    pub fn new() -> Self {
        let environment: Environment = Arc::new(|name| env::var_os(name));
        let place = Place { name: "profile".into(), file: None };
        Self { profile: None, path: None, environment, every: None, place }.placed()
    }

    /// This profile, whatever `FAL_PROFILE` and fal's tools say. Upper and lower case differ.
    #[must_use]
    pub fn named(profile: impl Into<String>) -> Self {
        Self { profile: Some(profile.into()), ..Self::new() }
    }

    /// The file with the configuration. Default: the one that `FAL_CONFIG_PATH` names, else `~/.fal/config.toml`.
    #[must_use]
    pub fn path(mut self, path: impl Into<PathBuf>) -> Self {
        self.path = Some(path.into());
        self.placed()
    }

    /// How often to read the file. Default: every 5 s, each wait varied by up to a fifth.
    #[must_use]
    pub fn poll_every(mut self, every: Duration) -> Self {
        self.every = Some(every);
        self.placed()
    }

    /// The function that returns the value of a variable. Default: it reads the process's environment.
    #[must_use]
    pub fn environment(mut self, lookup: impl Fn(&str) -> Option<OsString> + Send + Sync + 'static) -> Self {
        self.environment = Arc::new(lookup);
        self.placed()
    }

    fn placed(mut self) -> Self {
        let file = match &self.path {
            Some(path) => Some(FileSource::named("profile", path.clone())),
            None => self.found_path().map(|path| FileSource::named("profile", path).if_present()),
        };
        let name = file.as_ref().map_or("profile", CredentialSource::name).into();
        let file = match self.every {
            Some(every) => file.map(|file| file.poll_every(every)),
            None => file,
        };
        self.place = Place { name, file };
        self
    }

    /// Where fal's tools have their configuration.
    fn found_path(&self) -> Option<PathBuf> {
        match (self.environment)("FAL_CONFIG_PATH") {
            Some(path) if path.is_empty() => None,
            Some(path) => match Path::new(&path).strip_prefix("~") {
                Ok(rest) => Some(self.home()?.join(rest)),
                Err(_) => Some(path.into()),
            },
            None => Some(self.home()?.join(".fal").join("config.toml")),
        }
    }

    fn home(&self) -> Option<PathBuf> {
        let variable = if cfg!(windows) { "USERPROFILE" } else { "HOME" };
        let home = (self.environment)(variable).map(PathBuf::from).or_else(env::home_dir);
        home.filter(|home| !home.as_os_str().is_empty())
    }

    fn named_profile(&self) -> Option<Named> {
        let in_code = self.profile.clone().map(|profile| Named { profile, by: "in code" });
        in_code.or_else(|| {
            let profile = (self.environment)("FAL_PROFILE").filter(|profile| !profile.is_empty())?;
            Some(Named { profile: profile.to_string_lossy().into_owned(), by: "by FAL_PROFILE" })
        })
    }

    /// The nickname of the account that was chosen with fal's own tools (`fal account set`), which a login acts for. It
    /// does not depend on the profile.
    ///
    /// # Errors
    /// As a load of this source, when the file cannot be read.
    pub async fn team(&self) -> Result<Option<String>, SourceError> {
        let Some(content) = self.content().await? else { return Ok(None) };
        let config = self.parse(self.text(&content.bytes)?)?;
        let Some(internal) = table(config.get_ref(), INTERNAL) else { return Ok(None) };
        Ok(self.string(internal, "team", INTERNAL)?.map(str::to_owned))
    }

    async fn content(&self) -> Result<Option<Content>, SourceError> {
        match &self.place.file {
            Some(file) => file.settled().await,
            None => Ok(None),
        }
    }

    fn find(&self, content: &[u8]) -> Result<Option<Credential>, SourceError> {
        let config = self.parse(self.text(content)?)?;
        let config = config.get_ref();
        let internal = table(config, INTERNAL);
        let profile = match self.named_profile() {
            Some(named) if named.profile == INTERNAL => return Err(self.missing(&named, config)),
            Some(named) => match table(config, &named.profile) {
                None => return Err(self.missing(&named, config)),
                Some(profile) => Some((named.profile, profile)),
            },
            None => internal
                .map(|internal| self.string(internal, "profile", INTERNAL))
                .transpose()?
                .flatten()
                .filter(|stored| *stored != INTERNAL)
                .and_then(|stored| Some((stored.to_owned(), table(config, stored)?))),
        };
        match profile {
            None => Ok(None),
            Some((name, profile)) => self.key_of(&name, profile),
        }
    }

    fn parse<'a>(&self, text: &'a str) -> Result<Spanned<DeTable<'a>>, SourceError> {
        DeTable::parse(text).map_err(|error| {
            // The error's own text may repeat the line.
            let place = error.span().and_then(|span| text.get(..span.start));
            let line = place.map_or(1, |before| 1 + before.matches('\n').count());
            self.invalid(format!("is no TOML: see line {line}"))
        })
    }

    fn key_of(&self, name: &str, profile: &DeTable<'_>) -> Result<Option<Credential>, SourceError> {
        let host = self.string(profile, "host", name)?;
        if host.is_some_and(|host| !HOSTS.iter().any(|ours| ours.eq_ignore_ascii_case(host.trim()))) {
            return Err(self.invalid(format!(
                "the `host` of the profile {} is that of another environment of fal, and this crate calls fal.run: \
                 choose another profile",
                quoted(name),
            )));
        }
        let Some(key) = self.string(profile, "key", name)? else {
            return Ok(None);
        };
        let source: Arc<str> = format!("{}#{}", self.name(), shown(name)).into();
        match Credential::key(key) {
            Ok(credential) => Ok(Some(credential.with_source(source))),
            Err(error) => Err(SourceError::malformed(source, error)),
        }
    }

    /// A text in a table, if it is there and not blank.
    fn string<'a>(&self, table: &'a DeTable<'_>, entry: &str, of: &str) -> Result<Option<&'a str>, SourceError> {
        match table.get(entry).map(|value| value.get_ref()) {
            None => Ok(None),
            Some(DeValue::String(text)) => Ok(Some(&**text).filter(|text| !trim(text.as_bytes()).is_empty())),
            Some(_) => Err(self.invalid(format!("`{entry}` of {} is no text: put it in quotes", quoted(of)))),
        }
    }

    fn text<'a>(&self, content: &'a [u8]) -> Result<&'a str, SourceError> {
        let content = content.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(content);
        std::str::from_utf8(content).map_err(|_| self.invalid("is no UTF-8 text: save it as UTF-8".to_owned()))
    }

    fn missing(&self, named: &Named, config: &DeTable<'_>) -> SourceError {
        let names = profiles(config);
        let list = match names.len() {
            0 => "there is none".to_owned(),
            count if count > MOST_NAMES => format!("there are {}, and others", names[..MOST_NAMES].join(", ")),
            _ => format!("there are {}", names.join(", ")),
        };
        let message = format!("has no profile {}, which was named {}; {list}", quoted(&named.profile), named.by);
        SourceError::not_found(Arc::clone(&self.place.name), message)
    }

    fn invalid(&self, message: String) -> SourceError {
        SourceError::invalid(Arc::clone(&self.place.name), message)
    }
}

impl CredentialSource for ProfileSource {
    fn name(&self) -> &str {
        &self.place.name
    }

    async fn load(&self) -> Result<Option<Credential>, SourceError> {
        match self.content().await? {
            Some(content) => self.find(&content.bytes),
            // A profile that was named is missing all the same.
            None => self.find(b""),
        }
    }

    fn poll_interval(&self) -> Option<Duration> {
        self.place.file.as_ref().and_then(CredentialSource::poll_interval)
    }

    fn watched_paths(&self) -> Vec<PathBuf> {
        self.place.file.as_ref().map(CredentialSource::watched_paths).unwrap_or_default()
    }
}

impl Default for ProfileSource {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for ProfileSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProfileSource")
            .field("name", &self.name())
            .field("profile", &self.profile.as_deref().map(shown))
            .finish_non_exhaustive()
    }
}

fn table<'a, 'i>(config: &'a DeTable<'i>, name: &str) -> Option<&'a DeTable<'i>> {
    config.get(name)?.get_ref().as_table()
}

/// The profiles are the tables of the top level. What else is there is none.
///
/// Source: `fal` 1.83.0 (`config.py`).
fn profiles(config: &DeTable<'_>) -> Vec<String> {
    let tables = config.iter().filter(|(_, value)| value.get_ref().is_table());
    let names = tables.map(|(name, _)| name.get_ref()).filter(|name| **name != INTERNAL);
    names.map(|name| quoted(name)).collect()
}

fn quoted(profile: &str) -> String {
    match shown(profile) {
        name if name == profile => format!("`{name}`"),
        hidden => hidden.to_owned(),
    }
}

/// The name of a profile as it is shown. `ProfileSource::named(env::var("FAL_KEY")?)` must not show the key.
fn shown(profile: &str) -> &str {
    let is_name =
        profile.len() <= 64 && !may_be_credential(profile.as_bytes()) && !profile.chars().any(|c| c.is_control());
    if is_name { profile } else { "(not shown, as it may be a key in place of a name)" }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::error::{SourceErrorKind, report};

    const CONFIG: &str = "stray = \"hush\"\n[__internal__]\nprofile = \"work\"\nteam = \"acme\"\n\n[work]\nkey = \"w:hush\"\n\
                          host = \"API.alpha.fal.ai\"\n[home]\nkey = \" h:hush\\n\"\n[bare]\n[far]\nkey = \"f:hush\"\n\
                          host = \"api.shark.fal.ai\"\n";

    struct Home(tempfile::TempDir);

    impl Home {
        fn new(config: &str) -> Self {
            let home = tempfile::tempdir().unwrap();
            fs::create_dir(home.path().join(".fal")).unwrap();
            fs::write(home.path().join(".fal/config.toml"), config).unwrap();
            Self(home)
        }

        fn source(&self, source: ProfileSource, variables: &[(&str, &str)]) -> ProfileSource {
            let home = self.0.path().as_os_str().to_owned();
            let variables: Vec<_> =
                variables.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
            source.environment(move |name| match name {
                "HOME" | "USERPROFILE" => Some(home.clone()),
                _ => variables.iter().find(|(set, _)| set == name).map(|(_, value)| value.into()),
            })
        }

        /// The header, or the error, in which the home directory is `~`.
        async fn load(&self, source: ProfileSource, variables: &[(&str, &str)]) -> String {
            let source = self.source(source, variables);
            let said = match source.load().await {
                Ok(Some(credential)) => {
                    format!("{} from {}", credential.header().to_str().unwrap(), credential.source().unwrap())
                }
                Ok(None) => "none".to_owned(),
                Err(error) => {
                    assert!(!format!("{error:?}").contains("hush"), "{error:?}");
                    report(&error)
                }
            };
            said.replace(&*self.0.path().to_string_lossy(), "~")
        }
    }

    #[tokio::test]
    async fn code_beats_the_variable_and_that_beats_the_stored_one() {
        let home = Home::new(CONFIG);
        let work = "Key w:hush from profile:~/.fal/config.toml#work";
        let private = "Key h:hush from profile:~/.fal/config.toml#home";
        assert_eq!(home.load(ProfileSource::new(), &[]).await, work);
        assert_eq!(home.load(ProfileSource::new(), &[("FAL_PROFILE", "")]).await, work);
        assert_eq!(home.load(ProfileSource::new(), &[("FAL_PROFILE", "home")]).await, private);
        assert_eq!(home.load(ProfileSource::named("work"), &[("FAL_PROFILE", "home")]).await, work);
        assert_eq!(home.load(ProfileSource::named("bare"), &[]).await, "none");
    }

    #[tokio::test]
    async fn a_named_profile_that_is_missing_is_an_error_with_a_list() {
        let home = Home::new(CONFIG);
        let there_are = "there are `bare`, `far`, `home`, `work`";
        for name in ["Work", "stray", "__internal__"] {
            let said = home.load(ProfileSource::new(), &[("FAL_PROFILE", name)]).await;
            let expected = format!(
                "profile:~/.fal/config.toml: has no profile `{name}`, which was named by FAL_PROFILE; {there_are}"
            );
            assert_eq!(said, expected);
        }
        let said = home.load(ProfileSource::named("id:hush"), &[]).await;
        assert!(said.contains("(not shown, as it may be a key") && said.contains("in code"), "{said}");
        let source = home.source(ProfileSource::named("work"), &[("FAL_CONFIG_PATH", "")]);
        let error = source.load().await.unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::NotFound);
        assert_eq!(error.to_string(), "profile: has no profile `work`, which was named in code; there is none");
    }

    #[tokio::test]
    async fn a_stored_profile_that_is_missing_is_none() {
        for config in
            ["[__internal__]\nprofile = \"gone\"\n[work]\nkey = \"w:hush\"\n", "[work]\nkey = \"w:hush\"\n", ""]
        {
            assert_eq!(Home::new(config).load(ProfileSource::new(), &[]).await, "none", "{config}");
        }
        let home = Home::new("[__internal__]\nprofile = \"__internal__\"\nkey = \"w:hush\"\n");
        assert_eq!(home.load(ProfileSource::new(), &[]).await, "none");
    }

    #[tokio::test]
    async fn a_profile_of_another_environment_is_refused() {
        let home = Home::new(CONFIG);
        let said = home.load(ProfileSource::named("far"), &[]).await;
        assert!(said.contains("the `host` of the profile `far` is that of another environment of fal"), "{said}");
        for host in ["rest.fal.ai", "https://api.fal.ai", "api.fal.ai.evil.example", "fal.run"] {
            let home = Home::new(&format!("[work]\nhost = \"{host}\"\nkey = \"w:hush\"\n"));
            let said = home.load(ProfileSource::named("work"), &[]).await;
            assert!(said.contains("another environment"), "{host}: {said}");
        }
    }

    #[tokio::test]
    async fn what_is_broken_is_an_error_that_shows_nothing() {
        for (config, expected) in [
            ("[work]\nkey = \"hush\"\n", "#work: holds no credential: the key has no `:`"),
            ("[work]\nkey = 7\n", "`key` of `work` is no text"),
            ("[work]\nkey = [\"w:hush\"]\n", "`key` of `work` is no text"),
            ("[work]\nhost = false\nkey = \"w:hush\"\n", "`host` of `work` is no text"),
            ("[work]\nkey = w:hush\n", "is no TOML: see line 2"),
            ("[work]\nkey = \"w:hush\n", "is no TOML: see line 2"),
            ("[work]\nkey = \"w:hush\"\nkey = \"w:hush\"\n", "is no TOML: see line 3"),
            ("[__internal__]\nprofile = 1\n[work]\nkey = \"w:hush\"\n", "`profile` of `__internal__` is no text"),
        ] {
            let home = Home::new(config);
            let named = if config.contains("__internal__") { "" } else { "work" };
            let said = home.load(ProfileSource::new(), &[("FAL_PROFILE", named)]).await;
            assert!(said.contains(expected), "{config}: {said}");
        }
        let home = Home::new(&"[".repeat(60_000));
        assert!(home.load(ProfileSource::new(), &[]).await.contains("is no TOML"));
        let home = Home::new(&format!("a = {}", "[".repeat(60_000)));
        assert!(home.load(ProfileSource::new(), &[]).await.contains("is no TOML"));
        let home = Home::new(&"#".repeat(65_537));
        assert!(home.load(ProfileSource::new(), &[]).await.contains("is larger than 65536 bytes"));
        let home = Home::new("");
        fs::write(home.0.path().join(".fal/config.toml"), b"[work]\nkey = \"w:hush\xFF\"\n").unwrap();
        assert!(home.load(ProfileSource::new(), &[]).await.contains("is no UTF-8 text"));
    }

    #[tokio::test]
    async fn a_blank_key_or_host_counts_as_unset() {
        let home = Home::new("\u{FEFF}[work]\nkey = \" \"\nhost = \"\"\n");
        assert_eq!(home.load(ProfileSource::named("work"), &[]).await, "none");
    }

    #[tokio::test]
    async fn the_variable_says_where_the_file_is() {
        let home = Home::new(CONFIG);
        let elsewhere = home.0.path().join("other.toml");
        fs::write(&elsewhere, "[__internal__]\nprofile = \"it\"\n[it]\nkey = \"i:hush\"\n").unwrap();
        let path = elsewhere.to_str().unwrap();
        for path in [path, "~/other.toml"] {
            let said = home.load(ProfileSource::new(), &[("FAL_CONFIG_PATH", path)]).await;
            assert_eq!(said, "Key i:hush from profile:~/other.toml#it");
        }
        for path in ["", "~/gone.toml"] {
            let variables = [("FAL_CONFIG_PATH", path), ("FAL_HOME_DIR", "~/.fal")];
            assert_eq!(home.load(ProfileSource::new(), &variables).await, "none");
        }
        let in_code = ProfileSource::new().path(&elsewhere);
        let variables = [("FAL_CONFIG_PATH", "~/.fal/config.toml")];
        assert_eq!(home.load(in_code, &variables).await, "Key i:hush from profile:~/other.toml#it");
        let said = home.load(ProfileSource::new().path(home.0.path().join("gone.toml")), &[]).await;
        assert!(said.starts_with("profile:~/gone.toml: cannot be found"), "{said}");
    }

    #[test]
    fn the_file_is_polled_and_watched() {
        let home = Home::new(CONFIG);
        let source = home.source(ProfileSource::new(), &[]);
        assert_eq!(source.poll_interval(), Some(Duration::from_secs(5)));
        assert_eq!(source.watched_paths(), [home.0.path().join(".fal/config.toml")]);
        let source = source.poll_every(Duration::from_secs(9));
        assert_eq!(source.poll_interval(), Some(Duration::from_secs(9)));
        let none = home.source(ProfileSource::new(), &[("FAL_CONFIG_PATH", "")]);
        assert_eq!((none.poll_interval(), none.watched_paths()), (None, vec![]));
        let shown = format!("{:?}", home.source(ProfileSource::named("id:hush"), &[]));
        assert!(shown.contains("not shown") && !shown.contains("hush"), "{shown}");
    }
}
