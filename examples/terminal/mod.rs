//! What the examples have in common on a command line: arguments, errors with their causes, exit codes, and text from
//! strangers.
#![allow(dead_code)] // each example uses a part of it

use std::{
    error::Error as _,
    fmt::{self, Write as _},
    process::ExitCode,
    str::FromStr,
};

use clap::{
    Parser,
    error::{ContextKind, ContextValue, ErrorKind},
};
use http::Uri;
use tower_fal::{
    error::{BoxError, report},
    origin::FalOrigins,
};

/// The whole of a `main`: reads the arguments, runs the example, and prints its error with the causes.
pub(crate) async fn run<A: Parser>(example: impl AsyncFnOnce(A) -> Result<(), BoxError>) -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    match example(arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", Printable(&report(&*error)));
            ExitCode::FAILURE
        }
    }
}

/// The arguments of this process, or the code to end with: 0 after `--help`, 2 if they are wrong.
pub(crate) fn arguments<A: Parser>() -> Result<A, ExitCode> {
    A::try_parse().map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp => {
            print!("{error}");
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("{} See --help.", explanation::<A>(&error));
            ExitCode::from(2)
        }
    })
}

/// What is wrong with the arguments, in one line. clap's own text repeats what was typed, and that may be a key. This
/// one names options that the example has, and nothing else.
fn explanation<A: Parser>(error: &clap::Error) -> String {
    let mut command = A::command();
    command.build();
    let own: Vec<_> = command.get_arguments().map(ToString::to_string).collect();
    let options = |kind| match error.get(kind) {
        Some(ContextValue::String(name)) if own.contains(name) => name.clone(),
        // clap makes these lists of the example's own options only.
        Some(ContextValue::Strings(names)) => names.join(" and "),
        _ => "an option".to_owned(),
    };
    let option = options(ContextKind::InvalidArg);
    match error.kind() {
        ErrorKind::UnknownArgument => "There is an argument that this example does not know.".to_owned(),
        ErrorKind::InvalidValue => format!("{option} needs a value."),
        ErrorKind::ValueValidation => {
            // The errors of the types that the examples read from arguments do not repeat the text.
            let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
            format!("The value of {option} cannot be used{cause}.")
        }
        ErrorKind::TooFewValues | ErrorKind::TooManyValues | ErrorKind::WrongNumberOfValues => {
            format!("{option} does not have the right number of values.")
        }
        ErrorKind::MissingRequiredArgument => format!("{option} is missing."),
        ErrorKind::ArgumentConflict => match options(ContextKind::PriorArg) {
            prior if prior == option => format!("{option} is there more than once."),
            // Not `<ID>....`: the dots of an option that takes several values end no sentence.
            prior => format!("{option} cannot be used together with {}.", prior.trim_end_matches("...")),
        },
        ErrorKind::InvalidUtf8 => "There is an argument that is not UTF-8.".to_owned(),
        _ => "The arguments cannot be understood.".to_owned(),
    }
}

/// A URL of fal, or one that takes its place. Only one that may see a key can be made.
#[derive(Clone)]
pub(crate) struct BaseUrl {
    /// The scheme, the host and the path, without a slash at the end.
    pub(crate) url: String,
    /// This origin and no other: the example calls nobody else.
    pub(crate) origins: FalOrigins,
}

impl FromStr for BaseUrl {
    type Err = BoxError;

    fn from_str(text: &str) -> Result<Self, BoxError> {
        let url: Uri = text.parse().map_err(|_| "it is not a URL")?;
        let (Some(scheme), Some(authority), None) = (url.scheme(), url.authority(), url.query()) else {
            return Err("it must be like https://host/path".into());
        };
        let origin = format!("{scheme}://{authority}");
        // This refuses an origin to which the key would go in clear.
        let origins = FalOrigins::only([])?.and(&origin)?;
        Ok(Self { url: format!("{origin}{}", url.path().trim_end_matches('/')), origins })
    }
}

/// Text that somebody else wrote, for a terminal. Control characters are escaped: they could move the cursor, change
/// what was printed before, or set the terminal's title. Line breaks and tabs stay.
pub(crate) struct Printable<'a>(pub(crate) &'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            if (character.is_control() && !matches!(character, '\n' | '\t')) || is_bidirectional(character) {
                write!(f, "{}", character.escape_unicode())?;
            } else {
                f.write_char(character)?;
            }
        }
        Ok(())
    }
}

/// Whether it changes the direction of the text around it, so that a terminal shows it in another order.
fn is_bidirectional(character: char) -> bool {
    matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}
