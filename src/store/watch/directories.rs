//! The directories in which the files of a source are.

#[cfg(unix)]
use std::os::unix::fs::MetadataExt as _;
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// How many symbolic links in a row are followed to the directories behind them.
const MOST_LINKS: usize = 8;

/// The directories to watch for some files, by their canonical paths.
#[derive(Default)]
pub(super) struct Directories {
    pub(super) wanted: BTreeMap<PathBuf, Directory>,
    /// Why the directory of a file is missing here.
    pub(super) failure: Option<io::Error>,
}

/// A directory to watch.
pub(super) struct Directory {
    pub(super) identity: Identity,
    /// Whether one of the files is in it. Otherwise only a symbolic link leads there.
    pub(super) is_needed: bool,
}

impl Directories {
    /// Looks where the files are now. This may block.
    pub(super) fn of(paths: Vec<PathBuf>) -> Self {
        let mut directories = Self::default();
        for path in paths {
            match identify(directory_of(&path)) {
                Ok((directory, identity)) => {
                    directories.wanted.insert(directory, Directory { identity, is_needed: true });
                }
                Err(error) => {
                    directories.failure.get_or_insert(error);
                }
            }
            for (directory, identity) in behind_links(path).filter_map(|directory| identify(&directory).ok()) {
                directories.wanted.entry(directory).or_insert(Directory { identity, is_needed: false });
            }
        }
        directories
    }
}

/// The parent.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

/// The directories of the files to which links lead from here, one link after the other.
fn behind_links(path: PathBuf) -> impl Iterator<Item = PathBuf> {
    let follow = |path: &PathBuf| fs::read_link(path).ok().map(|target| directory_of(path).join(target));
    std::iter::successors(Some(path), follow).skip(1).take(MOST_LINKS).map(|path| directory_of(&path).to_owned())
}

/// Identifies a directory, whatever its path. Inode numbers are reused, so the creation time is included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    #[cfg(unix)]
    inode: (u64, u64),
    #[cfg(not(unix))]
    path: PathBuf,
    created: Option<SystemTime>,
}

fn identify(directory: &Path) -> io::Result<(PathBuf, Identity)> {
    let path = fs::canonicalize(directory)?;
    let metadata = fs::metadata(&path)?;
    let identity = Identity {
        #[cfg(unix)]
        inode: (metadata.dev(), metadata.ino()),
        #[cfg(not(unix))]
        path: path.clone(),
        created: metadata.created().ok(),
    };
    Ok((path, identity))
}
