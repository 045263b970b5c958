//! The directories in which the files of a source are.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// How many symbolic links in a row are followed to the directories behind them.
const MOST_LINKS: usize = 8;

/// The parent.
pub(super) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

/// The directories of the files to which links lead from here, one link after the other.
pub(super) fn behind_links(path: PathBuf) -> impl Iterator<Item = PathBuf> {
    let follow = |path: &PathBuf| fs::read_link(path).ok().map(|target| directory_of(path).join(target));
    std::iter::successors(Some(path), follow).skip(1).take(MOST_LINKS).map(|path| directory_of(&path).to_owned())
}

/// Identifies a directory. Inode numbers are reused, so the creation time is included.
pub(super) type Identity = ((u64, u64), Option<SystemTime>);

pub(super) fn identify(directory: &Path) -> io::Result<(PathBuf, Identity)> {
    let directory = fs::canonicalize(directory)?;
    let metadata = fs::metadata(&directory)?;
    #[cfg(unix)]
    let inode = {
        use std::os::unix::fs::MetadataExt as _;
        (metadata.dev(), metadata.ino())
    };
    #[cfg(not(unix))]
    let inode = (0, 0);
    Ok((directory, (inode, metadata.created().ok())))
}
