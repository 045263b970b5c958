use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

use tower_fal::{
    CredentialStore,
    error::{SourceErrorKind, report},
    login::LoginSource,
    mock::Endpoint,
    source::{ChainSource, CredentialSource as _, from_fn},
};

use crate::support::{EXPIRED, MINUTE, World, load, token};

#[tokio::test(start_paused = true)]
async fn the_file_is_read_as_fals_tools_write_it() {
    let world = World::new();
    let text = world.server.log_in_with_access(60 * MINUTE);
    let (refresh, access) = text.split_once('\n').unwrap();
    for text in [
        text.clone(),
        format!("{text}\n"),
        format!("{refresh}\r\n{access}\r\n"),
        format!("\n\n {refresh} \n\n\t{access}\n\n"),
        format!("{refresh}\n{access}\na third line"),
    ] {
        world.write(&text);
        assert_eq!(token(&load(&world.source()).await), access, "{text:?}");
    }
    assert_eq!(world.server.received(Endpoint::Token), 0);
}

#[tokio::test(start_paused = true)]
async fn a_file_that_is_something_else_is_an_error_with_a_rule() {
    for (content, rule) in [
        (vec![b'x'; 1024 * 1024], "is longer than 65536 bytes"),
        (b"\x7fELF\x02\x01\xff\xfe".to_vec(), "is not text"),
        (b"\0\0\0\0".to_vec(), "has a line that is no token"),
        (b"two words\n".to_vec(), "has a line that is no token"),
    ] {
        let world = World::new();
        world.write(&content);
        let error = world.source().load().await.unwrap_err();
        assert!(report(&error).contains(rule), "{}", report(&error));
        assert_eq!(fs::read(world.path()).unwrap(), content, "it is never removed");
    }
    let world = World::new();
    fs::create_dir(world.path()).unwrap();
    let error = world.source().load().await.unwrap_err();
    assert!(report(&error).contains("is no regular file"), "{}", report(&error));
}

#[tokio::test(start_paused = true)]
async fn without_a_login_there_is_no_credential() {
    let world = World::new();
    let error = world.source().load().await.unwrap_err();
    assert_eq!(error.kind(), SourceErrorKind::NotFound);
    assert!(report(&error).contains("auth0_token has no login: run `fal auth login`"), "{}", report(&error));
    assert!(world.source().if_present().load().await.unwrap().is_none());
    world.write("\n");
    assert!(world.source().if_present().load().await.unwrap().is_none());
    let nowhere = world.home.path().join("missing");
    assert!(world.source().home(&nowhere).if_present().load().await.unwrap().is_none());

    // A home that nobody has named, but the environment.
    let of_user = LoginSource::with_client(world.server.clone()).environment({
        let nowhere = nowhere.into_os_string();
        move |name| (name == "HOME" || name == "USERPROFILE").then(|| nowhere.clone())
    });
    assert!(of_user.load().await.unwrap().is_none());
    let other = from_fn("other", None, || async { Ok(tower_fal::Credential::key("id:secret")?) });
    assert!(ChainSource::new().push(of_user).push(other).load().await.unwrap().is_some());
}

#[cfg(unix)]
#[tokio::test(start_paused = true)]
async fn a_home_behind_a_link_is_a_home() {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    let world = World::with_access(EXPIRED);
    let outside = tempfile::tempdir().unwrap();
    let link = outside.path().join("link");
    symlink(world.home.path(), &link).unwrap();
    assert!(world.server.accepts(&load(&world.source().home(&link)).await));
    assert_eq!(world.server.refreshes(), 1);
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(fs::metadata(world.path()).unwrap().permissions().mode() & 0o777, 0o600);
}

/// Whether the rights of files hold for the user of the tests. They do not for root.
#[cfg(unix)]
fn rights_hold(directory: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;

    fs::set_permissions(directory, fs::Permissions::from_mode(0o500)).unwrap();
    let hold = fs::write(directory.join("probe"), "").is_err();
    let _ = fs::remove_file(directory.join("probe"));
    hold
}

/// A directory where nothing can be written, whoever the user is: the place of the new file is taken by a directory.
#[tokio::test(start_paused = true)]
async fn nothing_is_spent_where_nothing_can_be_written() {
    let world = World::with_access(EXPIRED);
    fs::create_dir(world.home.path().join(".auth0_token.tower-fal")).unwrap();
    let before = world.tokens();
    let error = world.source().load().await.unwrap_err();
    assert!(report(&error).contains("cannot be written"), "{}", report(&error));
    assert_eq!((world.server.received(Endpoint::Token), world.tokens()), (0, before));
}

#[cfg(unix)]
#[tokio::test(start_paused = true)]
async fn nothing_is_spent_in_a_home_that_is_read_only() {
    use std::os::unix::fs::PermissionsExt as _;

    let world = World::with_access(EXPIRED);
    let before = world.tokens();
    if rights_hold(world.home.path()) {
        let error = world.source().load().await.unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::Unreadable);
        assert!(report(&error).contains("make its directory writable"), "{}", report(&error));
        assert_eq!((world.server.received(Endpoint::Token), world.tokens()), (0, before));
    }
    fs::set_permissions(world.home.path(), fs::Permissions::from_mode(0o700)).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_change_of_the_file_shows_within_twelve_seconds() {
    let world = World::with_access(60 * MINUTE);
    let store = CredentialStore::builder(world.source()).build().await.unwrap();
    for _ in 0..5 {
        world.write(world.server.log_in_with_access(60 * MINUTE));
        tokio::time::sleep(Duration::from_secs(12)).await;
        assert_eq!(token(store.load().credential()), world.tokens()[1]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_half_written_file_is_waited_for() {
    let world = World::with_access(60 * MINUTE);
    let text = world.server.log_in_with_access(60 * MINUTE);
    world.write(&text[..text.len() / 2]);
    // It is never old enough to be at rest, however long this thread is stopped before the file is read.
    let soon = SystemTime::now() + 60 * MINUTE;
    fs::File::options().write(true).open(world.path()).unwrap().set_modified(soon).unwrap();
    let source = world.source();
    let loading = tokio::spawn(async move { load(&source).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    world.write(&text);
    assert_eq!(token(&loading.await.unwrap()), world.tokens()[1]);
    assert_eq!(world.server.received(Endpoint::Token), 0);
}

#[test]
fn debug_and_names_show_where_and_nothing_else() {
    let source = LoginSource::new().environment(|name| (name == "FAL_HOME_DIR").then(|| "/srv/fal".into()));
    assert_eq!(source.name(), "login:/srv/fal/auth0_token");
    assert_eq!(source.watched_paths()[0], Path::new("/srv/fal/auth0_token"));
    assert!(format!("{source:?}").contains("/srv/fal"));
    let of_code = source.home("/elsewhere").environment(|_| Some("/nowhere".into()));
    assert_eq!(of_code.name(), "login:/elsewhere/auth0_token", "what is named in code beats the environment");
}
