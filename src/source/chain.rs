use std::{
    fmt,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{runtime::Handle, time::Instant};

use super::{BoxSource, CredentialSource, DEFAULT_LOAD_TIMEOUT, LoadReason};
use crate::{
    credential::Credential,
    error::{SourceError, SourceErrorKind},
    events,
};

/// Several sources, in the order in which they are asked.
///
/// The first source that has a credential wins. A source that has none (`Ok(None)`) is skipped. A source that fails
/// ends the search: the chain never takes a key of a later source in place of a broken one, and the store keeps the
/// last good credential. The error names each source that was asked, and its answer.
///
/// A chain is **sticky**. Once a source has won, the sources behind it do not take its place when it has no credential
/// any more: that load fails, unless you [allow it](Self::fall_through_after). A source in front of the winner takes
/// its place as soon as it has a credential.
///
/// ```
/// use tower_fal::source::{ChainSource, EnvSource, FileSource};
///
/// let source = ChainSource::new().push(EnvSource::all()).push(FileSource::new("/run/secrets/fal/key"));
/// # let _ = source;
/// ```
///
/// All sources are polled together, at the shortest interval of any of them, and the files of all of them are watched.
/// A load may take as long as the longest limit of any of them. That a credential [expires or was
/// refused](LoadReason) is told to the winner alone; the others are asked as at an interval.
///
/// If a credential that can never change in this process (an environment variable) stands before a file that exists,
/// this is logged once as a warning, with the `tracing` feature: a rotation of that file would have no effect.
pub struct ChainSource {
    sources: Vec<BoxSource>,
    name: String,
    fall_through_after: Option<Duration>,
    winner: Mutex<Option<Winner>>,
}

/// The source whose credential the chain returned last.
#[derive(Clone, Copy)]
struct Winner {
    index: usize,
    absent_since: Option<Instant>,
}

impl ChainSource {
    /// A chain without sources. It has no credential.
    #[must_use]
    pub fn new() -> Self {
        Self { sources: Vec::new(), name: "chain()".to_owned(), fall_through_after: None, winner: Mutex::default() }
    }

    /// Adds a source that is asked when all sources before it have no credential.
    #[must_use]
    pub fn push(mut self, source: impl CredentialSource) -> Self {
        self.sources.push(BoxSource::new(source));
        let names: Vec<_> = self.sources.iter().map(CredentialSource::name).collect();
        self.name = format!("chain({})", names.join(", "));
        self
    }

    /// Lets later sources take the winner's place once it has had no credential for this long. Default: never.
    ///
    /// The time starts with the first load in which the winner had none (`Ok(None)`). A source that fails keeps its
    /// place, however long it fails.
    #[must_use]
    pub fn fall_through_after(mut self, absence: Duration) -> Self {
        self.fall_through_after = Some(absence);
        self
    }

    fn set_winner(&self, index: usize, credential: &Credential) {
        let last = self.winner().replace(Winner { index, absent_since: None });
        if last.is_none_or(|last| last.index != index) {
            self.report_shadowed(index, credential);
        }
    }

    /// Whether a source that has no credential now is the winner, and keeps its place for now.
    fn is_missed(&self, index: usize) -> bool {
        let mut winner = self.winner();
        let Some(winner) = winner.as_mut().filter(|winner| winner.index == index) else {
            return false;
        };
        let since = *winner.absent_since.get_or_insert_with(Instant::now);
        self.fall_through_after.is_none_or(|absence| since.elapsed() < absence)
    }

    /// Warns if the winner's credential never changes and a later source has a file.
    fn report_shadowed(&self, index: usize, credential: &Credential) {
        let winner = &self.sources[index];
        if winner.poll_interval().is_some() {
            return;
        }
        let behind: Vec<_> = self.sources[index + 1..]
            .iter()
            .flat_map(|source| source.watched_paths().into_iter().map(|path| (source.name().to_owned(), path)))
            .collect();
        // On another thread, and nothing waits for it: a file system that hangs must not delay the credential.
        if let (false, Ok(runtime)) = (behind.is_empty(), Handle::try_current()) {
            let (winner, key_id) = (winner.name().to_owned(), credential.key_id().cloned());
            runtime.spawn_blocking(move || {
                if let Some((shadowed, _)) = behind.iter().find(|(_, path)| path.exists()) {
                    events::shadowed(&winner, key_id.as_ref(), shadowed);
                }
            });
        }
    }

    fn failed(&self, kind: SourceErrorKind, said: &[String], cause: Option<SourceError>) -> SourceError {
        SourceError::chained(self.name.as_str(), kind, said.join(", "), cause)
    }

    fn winner(&self) -> MutexGuard<'_, Option<Winner>> {
        self.winner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CredentialSource for ChainSource {
    fn name(&self) -> &str {
        &self.name
    }

    async fn load(&self) -> Result<Option<Credential>, SourceError> {
        self.load_because(LoadReason::Poll).await
    }

    async fn load_because(&self, reason: LoadReason<'_>) -> Result<Option<Credential>, SourceError> {
        let mut said = Vec::new();
        let winner = self.winner().map(|winner| winner.index);
        for (index, source) in self.sources.iter().enumerate() {
            let name = source.name();
            // The credential that expires or was refused is none of the other sources'.
            let reason = if winner == Some(index) { reason } else { LoadReason::Poll };
            match source.load_because(reason).await {
                Ok(Some(credential)) => {
                    self.set_winner(index, &credential);
                    let is_named = credential.source().is_some();
                    return Ok(Some(if is_named { credential } else { credential.with_source(name) }));
                }
                Ok(None) if self.is_missed(index) => {
                    said.push(format!("{name} has no credential any more, and the chain waits for it"));
                    return Err(self.failed(SourceErrorKind::NotFound, &said, None));
                }
                Ok(None) => said.push(format!("{name} has no credential")),
                Err(error) => {
                    said.push(format!("{name} failed, and the chain waits for it"));
                    return Err(self.failed(error.kind(), &said, Some(error)));
                }
            }
        }
        Ok(None)
    }

    fn load_timeout(&self) -> Option<Duration> {
        let longest = self.sources.iter().filter_map(CredentialSource::load_timeout).max()?;
        let is_default = |source: &BoxSource| source.load_timeout().is_none();
        Some(if self.sources.iter().any(is_default) { longest.max(DEFAULT_LOAD_TIMEOUT) } else { longest })
    }

    fn poll_interval(&self) -> Option<Duration> {
        self.sources.iter().filter_map(CredentialSource::poll_interval).min()
    }

    fn watched_paths(&self) -> Vec<PathBuf> {
        self.sources.iter().flat_map(CredentialSource::watched_paths).collect()
    }

    fn poll_interval_while_watched(&self) -> Option<Duration> {
        self.sources.iter().filter_map(CredentialSource::poll_interval_while_watched).min()
    }
}

impl Default for ChainSource {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for ChainSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChainSource")
            .field("sources", &self.sources)
            .field("fall_through_after", &self.fall_through_after)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        error::report,
        source::{EnvSource, FileSource, from_fn_with},
    };

    /// What a source answers: the number of a key, nothing, or an error.
    type Says = Arc<Mutex<Result<Option<u32>, &'static str>>>;

    fn source(name: &'static str, says: &Says) -> impl CredentialSource {
        from_fn_with(name, Duration::from_secs(5), Arc::clone(says), async |says: Says| {
            let says = *says.lock().unwrap();
            let key = says?.map(|n| Credential::key(format!("id-{n}:secret"))).transpose()?;
            Ok(key)
        })
    }

    struct Three {
        says: [Says; 3],
        chain: ChainSource,
    }

    fn three() -> Three {
        let says = [(); 3].map(|()| Says::new(Mutex::new(Ok(None))));
        let chain = ChainSource::new();
        let chain = chain.push(source("a", &says[0])).push(source("b", &says[1])).push(source("c", &says[2]));
        Three { says, chain }
    }

    impl Three {
        fn say(&self, index: usize, says: Result<Option<u32>, &'static str>) {
            *self.says[index].lock().unwrap() = says;
        }

        /// The id of the key and the source it came from, or the error.
        async fn load(&self) -> String {
            match self.chain.load().await {
                Ok(Some(key)) => format!("{} from {}", key.key_id().unwrap(), key.source().unwrap()),
                Ok(None) => "none".to_owned(),
                Err(error) => report(&error),
            }
        }
    }

    const B_IS_MISSED: &str =
        "chain(a, b, c): a has no credential, b has no credential any more, and the chain waits for it";

    #[tokio::test]
    async fn the_first_that_has_a_credential_wins() {
        let three = three();
        assert_eq!(three.load().await, "none");
        three.say(2, Ok(Some(3)));
        assert_eq!(three.load().await, "id-3 from c");
        three.say(1, Ok(Some(2)));
        assert_eq!(three.load().await, "id-2 from b");
        three.say(0, Ok(Some(1)));
        assert_eq!(three.load().await, "id-1 from a");
    }

    #[tokio::test]
    async fn a_failure_ends_the_search_and_names_every_source_asked() {
        let three = three();
        three.say(1, Err("connection refused"));
        three.say(2, Ok(Some(3)));
        let said = "chain(a, b, c): a has no credential, b failed, and the chain waits for it: \
                    b: could not load a credential: connection refused";
        assert_eq!(three.load().await, said);
    }

    #[tokio::test(start_paused = true)]
    async fn a_winner_without_a_credential_keeps_its_place() {
        let three = three();
        three.say(1, Ok(Some(2)));
        three.say(2, Ok(Some(3)));
        assert_eq!(three.load().await, "id-2 from b");
        three.say(1, Ok(None));
        for _ in 0..100 {
            assert_eq!(three.load().await, B_IS_MISSED);
            tokio::time::advance(Duration::from_secs(3600)).await;
        }
        three.say(1, Ok(Some(4)));
        assert_eq!(three.load().await, "id-4 from b");
    }

    #[tokio::test]
    async fn a_winner_that_fails_keeps_its_place() {
        let three = three();
        three.say(1, Ok(Some(2)));
        three.say(2, Ok(Some(3)));
        assert_eq!(three.load().await, "id-2 from b");
        three.say(1, Err("connection refused"));
        assert!(three.load().await.contains("b failed"));
        three.say(1, Ok(None));
        assert_eq!(three.load().await, B_IS_MISSED);
    }

    #[tokio::test]
    async fn a_source_in_front_of_the_winner_takes_its_place() {
        let three = three();
        three.say(2, Ok(Some(3)));
        assert_eq!(three.load().await, "id-3 from c");
        three.say(0, Ok(Some(1)));
        assert_eq!(three.load().await, "id-1 from a");
        three.say(0, Ok(None));
        assert_eq!(three.load().await, "chain(a, b, c): a has no credential any more, and the chain waits for it");
    }

    #[tokio::test(start_paused = true)]
    async fn a_chain_falls_through_after_the_allowed_absence() {
        let mut three = three();
        three.chain = three.chain.fall_through_after(Duration::from_secs(60));
        three.say(1, Ok(Some(2)));
        three.say(2, Ok(Some(3)));
        assert_eq!(three.load().await, "id-2 from b");
        tokio::time::advance(Duration::from_secs(3600)).await; // it had a credential all the time
        three.say(1, Ok(None));
        assert_eq!(three.load().await, B_IS_MISSED);
        tokio::time::advance(Duration::from_secs(59)).await;
        assert_eq!(three.load().await, B_IS_MISSED);
        three.say(1, Ok(Some(2)));
        assert_eq!(three.load().await, "id-2 from b");
        tokio::time::advance(Duration::from_secs(3600)).await;
        three.say(1, Ok(None));
        assert_eq!(three.load().await, B_IS_MISSED); // the time starts again
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(three.load().await, "id-3 from c");
        three.say(1, Ok(Some(4)));
        assert_eq!(three.load().await, "id-4 from b");
    }

    #[tokio::test]
    async fn a_chain_in_a_chain_answers_like_any_source() {
        let (inner, outer) = (Says::new(Mutex::new(Ok(None))), Says::new(Mutex::new(Ok(Some(2)))));
        let chain = ChainSource::new().push(ChainSource::new().push(source("in", &inner))).push(source("out", &outer));
        assert_eq!(chain.name(), "chain(chain(in), out)");
        assert_eq!(chain.load().await.unwrap().unwrap().source(), Some("out"));
        *inner.lock().unwrap() = Err("no");
        assert!(chain.load().await.is_err());
    }

    /// What a source heard, and what it answers.
    #[derive(Clone)]
    struct Heard(&'static str, Says, Arc<Mutex<Vec<&'static str>>>, Option<Duration>);

    impl CredentialSource for Heard {
        fn name(&self) -> &str {
            self.0
        }

        async fn load(&self) -> Result<Option<Credential>, SourceError> {
            unreachable!("a chain says why it asks")
        }

        async fn load_because(&self, reason: LoadReason<'_>) -> Result<Option<Credential>, SourceError> {
            self.2.lock().unwrap().push(match reason {
                LoadReason::Poll => "poll",
                LoadReason::Expiring(_) => "expiring",
                LoadReason::Refused(_) => "refused",
            });
            source(self.0, &self.1).load().await
        }

        fn load_timeout(&self) -> Option<Duration> {
            self.3
        }
    }

    impl Heard {
        fn new(name: &'static str) -> Self {
            Self(name, Says::new(Mutex::new(Ok(None))), Arc::default(), None)
        }

        fn say(&self, says: Result<Option<u32>, &'static str>) {
            *self.1.lock().unwrap() = says;
        }

        fn heard(&self) -> Vec<&'static str> {
            std::mem::take(&mut self.2.lock().unwrap())
        }
    }

    #[tokio::test]
    async fn only_the_winner_is_told_of_an_expiry_or_a_refusal() {
        let [a, b, c] = ["a", "b", "c"].map(Heard::new);
        let inner = ChainSource::new().push(b.clone()).push(c.clone());
        let chain = BoxSource::new(ChainSource::new().push(a.clone()).push(inner));
        let heard = || [a.heard(), b.heard(), c.heard()];
        b.say(Ok(Some(2)));
        let refused = Credential::key("id-2:secret").unwrap();
        chain.load_because(LoadReason::Refused(&refused)).await.unwrap();
        assert_eq!(heard(), [vec!["poll"], vec!["poll"], vec![]], "nothing has won so far");
        chain.load_because(LoadReason::Refused(&refused)).await.unwrap();
        assert_eq!(heard(), [vec!["poll"], vec!["refused"], vec![]]);
        chain.load_because(LoadReason::Expiring(&refused)).await.unwrap();
        assert_eq!(heard(), [vec!["poll"], vec!["expiring"], vec![]]);
        chain.load().await.unwrap();
        assert_eq!(heard(), [vec!["poll"], vec!["poll"], vec![]]);
        a.say(Ok(Some(1))); // it takes the place of the one that was refused
        chain.load_because(LoadReason::Refused(&refused)).await.unwrap();
        assert_eq!(heard(), [vec!["poll"], vec![], vec![]]);
    }

    #[test]
    fn a_load_may_take_as_long_as_the_longest_limit() {
        let limit = |limits: &[Option<u64>]| {
            let sources = limits.iter().map(|limit| {
                Heard("limited", Says::new(Mutex::new(Ok(None))), Arc::default(), limit.map(Duration::from_secs))
            });
            let chain = sources.fold(ChainSource::new(), ChainSource::push);
            BoxSource::new(chain).load_timeout().map(|limit| limit.as_secs())
        };
        assert_eq!(limit(&[]), None);
        assert_eq!(limit(&[None, None]), None);
        assert_eq!(limit(&[Some(3), Some(90), Some(45)]), Some(90));
        assert_eq!(limit(&[Some(90), None]), Some(90));
        assert_eq!(limit(&[Some(3), None]), Some(10), "the other one has the store's default");
    }

    #[test]
    fn a_chain_polls_at_the_shortest_interval_and_watches_all_files() {
        let chain = ChainSource::default();
        assert_eq!((chain.poll_interval(), chain.watched_paths().len()), (None, 0));
        let says = Says::new(Mutex::new(Ok(None)));
        let chain = chain.push(EnvSource::key()).push(FileSource::new("/a").poll_every(Duration::from_secs(7)));
        let chain = chain.push(FileSource::new("/b"));
        assert_eq!(chain.poll_interval(), Some(Duration::from_secs(5)));
        assert_eq!(chain.watched_paths(), [PathBuf::from("/a"), PathBuf::from("/b")]);
        assert_eq!(chain.poll_interval_while_watched(), Some(Duration::from_secs(30)));
        // File events say nothing about a remote source.
        let chain = chain.push(source("remote", &says));
        assert_eq!(chain.poll_interval_while_watched(), Some(Duration::from_secs(5)));
    }
}
