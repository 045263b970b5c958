//! What the examples without a server say to whoever asks, and to whoever is mistaken.

use crate::support::example;

#[tokio::test]
async fn each_example_answers_help_and_does_nothing_when_it_is_mistaken() {
    let environment = ["FAL_KEY", "FAL_KEY_ID", "FAL_KEY_SECRET", "FAL_KEY_FILE"];
    for (name, says) in [
        ("hyper_client", "needs FAL_KEY"),
        ("quickstart", "takes no arguments"),
        ("stream", "--live"),
        ("websocket", "--live"),
        ("whoami", "looks at FAL_KEY"),
    ] {
        for (arguments, is_well) in [(vec!["--help"], true), (vec!["--hush"], false), (vec!["--hush", "{}"], false)] {
            let mut command = example(name);
            for variable in environment {
                command.env_remove(variable);
            }
            let output = command.args(&arguments).output().await.unwrap();
            assert_eq!(output.status.success(), is_well, "{name} {arguments:?}");
            let (to_read, empty) =
                if is_well { (output.stdout, output.stderr) } else { (output.stderr, output.stdout) };
            let told = String::from_utf8(to_read).unwrap();
            // A word of its own each time: the mistaken argument may be a key.
            let helps = told.contains(says) && !told.contains("hush");
            assert!(helps && empty.is_empty(), "{name} {arguments:?}: {told}");
        }
    }
}
