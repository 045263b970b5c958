/// How many files the server needs for other things than connections: its log, its key, the runtime, calls to fal.
const RESERVED: u64 = 64;

/// How many connections the system's limit of open files allows, or `None` if there is no such limit. Each one may need
/// a second one, to fal. The limit is raised first, as far as the system allows it to a process.
pub(crate) fn max_connections() -> Option<usize> {
    let files = raise_limit()?;
    Some(usize::try_from(files.saturating_sub(RESERVED) / 2).unwrap_or(usize::MAX).max(1))
}

#[cfg(unix)]
fn raise_limit() -> Option<u64> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // macOS refuses an unlimited number. Then the limit stays as it was.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    getrlimit(Resource::Nofile).current
}

#[cfg(not(unix))]
fn raise_limit() -> Option<u64> {
    None
}
