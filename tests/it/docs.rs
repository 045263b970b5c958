//! What the pages in `docs/` list is what is there.

use std::{collections::BTreeSet, fs, path::Path};

/// The string literals that read as sentences, outside of comments and of the file's own tests.
fn sentences(file: &Path) -> Vec<String> {
    let source = fs::read_to_string(file).unwrap();
    let code = source.split("mod tests {").next().unwrap();
    code.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| line.split('"').skip(1).step_by(2))
        .filter(|text| text.contains(' ') && text.starts_with(|first: char| first.is_ascii_lowercase()))
        .map(str::to_owned)
        .collect()
}

#[test]
fn each_event_has_its_row() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let folder = fs::read_dir(src.join("events")).unwrap().map(|entry| entry.unwrap().path());
    let emitted: BTreeSet<_> = folder.chain([src.join("events.rs")]).flat_map(|file| sentences(&file)).collect();

    let page = include_str!("../../docs/observability.md");
    let rows = page.lines().filter_map(|line| {
        let (level, row) = line.strip_prefix("| ")?.split_once(" | ")?;
        let (message, _) = row.split_once(" | ")?;
        ["info", "warn", "warn, by turns", "debug"].contains(&level).then(|| message.trim_matches('`'))
    });
    assert_eq!(rows.map(str::to_owned).collect::<BTreeSet<_>>(), emitted);
    assert!(emitted.len() > 10);
}
