//! Where fal's own tools keep the login on this machine.

use std::{
    env,
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
};

use super::error::{LoginError, LoginErrorKind};

/// The directory of the login: `FAL_HOME_DIR`, or `~/.fal`. An empty variable means the current directory.
///
/// Source: `fal` 1.83.0 (`auth/local.py`).
pub(super) fn home(variable: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf, LoginError> {
    let of_user = || {
        let name = if cfg!(windows) { "USERPROFILE" } else { "HOME" };
        let home = variable(name).map(PathBuf::from).or_else(env::home_dir);
        home.filter(|home| !home.as_os_str().is_empty()).ok_or_else(|| {
            LoginError::new(LoginErrorKind::Setting, "this user has no home directory: set HOME, or FAL_HOME_DIR")
        })
    };
    match variable("FAL_HOME_DIR") {
        Some(directory) if directory.is_empty() => Ok(PathBuf::from(".")),
        Some(directory) => match in_home(&directory) {
            Some(rest) => Ok(of_user()?.join(rest)),
            None => Ok(directory.into()),
        },
        None => Ok(of_user()?.join(".fal")),
    }
}

/// What follows a `~` at the start.
fn in_home(path: &OsStr) -> Option<&Path> {
    Path::new(path).strip_prefix("~").ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_home_is_where_fals_own_tools_have_it() {
        let home = |of_fal: Option<&str>| {
            let of_fal = of_fal.map(OsString::from);
            let found = home(|name| match name {
                "FAL_HOME_DIR" => of_fal.clone(),
                "HOME" | "USERPROFILE" => Some("/home/me".into()),
                _ => None,
            });
            found.unwrap()
        };
        assert_eq!(home(None), Path::new("/home/me/.fal"));
        assert_eq!(home(Some("")), Path::new("."));
        assert_eq!(home(Some("~/of-fal")), Path::new("/home/me/of-fal"));
        assert_eq!(home(Some("~")), Path::new("/home/me"));
        assert_eq!(home(Some("/srv/fal")), Path::new("/srv/fal"));
    }
}
