//! The own matcher of patterns, for endpoints and for targets of the proxy. In it `*` stands for a part of one segment,
//! `**` for any number of segments, and every other character for itself, `?` too.

/// A pattern, or the name of a host, that cannot be one.
///
/// The error names the rule and never the text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the {subject} {problem}")]
pub struct InvalidPattern {
    subject: &'static str,
    problem: &'static str,
}

impl InvalidPattern {
    pub(crate) const fn new(problem: &'static str) -> Self {
        Self::of("pattern", problem)
    }

    /// Of something that is no pattern.
    pub(crate) const fn of(subject: &'static str, problem: &'static str) -> Self {
        Self { subject, problem }
    }
}

/// A pattern for what slashes (or, of a host, dots) separate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segments(Box<[Segment]>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Segment {
    Literal(Box<str>),
    /// The text before the first `*`, those between two, and the one behind the last.
    Parts(Box<[Box<str>]>),
    /// `**`
    Any,
}

impl Segments {
    /// Reads a pattern. A slash at its end makes an empty last segment, which is matched by a slash at the end.
    pub(crate) fn parse(text: &str, separator: char) -> Result<Self, InvalidPattern> {
        let mut segments: Vec<_> = text.split(separator).map(Segment::parse).collect::<Result<_, _>>()?;
        // Two in a row say no more than one.
        segments.dedup_by(|next, last| *next == Segment::Any && *last == Segment::Any);
        let inner = segments.split_last().map_or(&[][..], |(_, inner)| inner);
        if text.is_empty() || inner.iter().any(Segment::is_empty) {
            return Err(InvalidPattern::new("has an empty segment: write no slash at its start, and no two in a row"));
        }
        Ok(Self(segments.into()))
    }

    /// Whether the whole of a text matches.
    pub(crate) fn matches(&self, text: &str, separator: u8) -> bool {
        // Where to go on when a segment does not match: behind the last `**`, which then takes one segment more. Only the
        // last one has to be tried so, and the time is bounded by the product of the two lengths.
        let mut retry = None;
        let (mut pattern, mut rest) = (&*self.0, Some(text));
        loop {
            match (pattern, rest) {
                ([], None) | ([Segment::Any], _) => return true,
                ([Segment::Any, after @ ..], _) => {
                    retry = Some((after, rest));
                    pattern = after;
                    continue;
                }
                ([segment, after @ ..], Some(text)) => {
                    let (first, others) = split_first(text, separator);
                    if segment.matches(first) {
                        (pattern, rest) = (after, others);
                        continue;
                    }
                }
                ([], Some(_)) | ([_, ..], None) => {}
            }
            match retry {
                Some((after, Some(text))) => {
                    let others = split_first(text, separator).1;
                    retry = Some((after, others));
                    (pattern, rest) = (after, others);
                }
                Some((_, None)) | None => return false,
            }
        }
    }

    /// Whether a text that begins with this one can match.
    pub(crate) fn matches_start(&self, start: &str, separator: u8) -> bool {
        let mut rest = Some(start);
        for segment in &self.0 {
            match (segment, rest) {
                (Segment::Any, _) | (_, None) => return true,
                (segment, Some(text)) => {
                    let (first, others) = split_first(text, separator);
                    if !segment.matches(first) {
                        return false;
                    }
                    rest = others;
                }
            }
        }
        rest.is_none()
    }

    /// Whether any segment is `**`.
    pub(crate) fn has_any(&self) -> bool {
        self.0.contains(&Segment::Any)
    }

    /// A text that this matches, with `x` for whatever is left open.
    pub(crate) fn example(&self, separator: char) -> String {
        let segment = |segment: &Segment| match segment {
            Segment::Literal(literal) => literal.to_string(),
            Segment::Parts(parts) => parts.join("x"),
            Segment::Any => "x".to_owned(),
        };
        self.0.iter().map(segment).collect::<Vec<_>>().join(&separator.to_string())
    }

    /// The text that this matches, if it is only one.
    pub(crate) fn literal(&self, separator: char) -> Option<String> {
        let mut text = String::new();
        for (place, segment) in self.0.iter().enumerate() {
            let Segment::Literal(literal) = segment else { return None };
            if place > 0 {
                text.push(separator);
            }
            text.push_str(literal);
        }
        Some(text)
    }
}

impl Segment {
    fn parse(text: &str) -> Result<Self, InvalidPattern> {
        if text == "**" {
            Ok(Self::Any)
        } else if text.contains("**") {
            Err(InvalidPattern::new("has `**` beside other characters: it stands alone between two slashes"))
        } else if text.contains('*') {
            Ok(Self::Parts(text.split('*').map(Into::into).collect()))
        } else {
            Ok(Self::Literal(text.into()))
        }
    }

    fn is_empty(&self) -> bool {
        matches!(self, Self::Literal(text) if text.is_empty())
    }

    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Literal(literal) => **literal == *text,
            Self::Parts(parts) => !text.is_empty() && match_parts(parts, text),
            Self::Any => true,
        }
    }
}

/// Whether the parts are in the text, one behind the other, the first at its start and the last at its end.
fn match_parts(parts: &[Box<str>], text: &str) -> bool {
    let [first, between @ .., last] = parts else { return false };
    let Some(mut rest) = text.strip_prefix(&**first).and_then(|rest| rest.strip_suffix(&**last)) else { return false };
    between.iter().all(|part| match rest.find(&**part) {
        Some(place) => {
            rest = &rest[place + part.len()..];
            true
        }
        None => false,
    })
}

/// The first segment, and the others if there is a separator.
fn split_first(text: &str, separator: u8) -> (&str, Option<&str>) {
    match text.as_bytes().iter().position(|byte| *byte == separator) {
        // A separator is one byte of ASCII, so both ends are at the border of a character.
        Some(place) => (&text[..place], Some(&text[place + 1..])),
        None => (text, None),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matches(pattern: &str, text: &str) -> bool {
        Segments::parse(pattern, '/').unwrap().matches(text, b'/')
    }

    #[test]
    fn each_character_stands_for_itself_but_the_star() {
        assert!(matches("a/b", "a/b"));
        for text in ["a", "a/b/", "a/b/c", "a/bb", "A/b", "/a/b", ""] {
            assert!(!matches("a/b", text), "{text}");
        }
        assert!(matches("a?[b]{c,d}.", "a?[b]{c,d}."));
        assert!(!matches("a?", "ab"));
    }

    #[test]
    fn one_star_stays_within_a_segment() {
        for text in ["flux/dev", "flux/d", "flux-2/d"] {
            assert!(matches("flux*/*", text), "{text}");
        }
        for text in ["flux", "flux/", "flux/a/b", "/a", "a/flux/a"] {
            assert!(!matches("flux*/*", text), "{text}");
        }
        assert!(matches("a*b*c", "abc") && matches("a*b*c", "axxbyybc"));
        assert!(!matches("a*b*c", "ac") && !matches("ab*ba", "aba") && !matches("a*b*b", "ab"));
    }

    #[test]
    fn two_stars_go_across_segments() {
        for text in ["a", "a/", "a/b", "a/b/c"] {
            assert!(matches("a/**", text), "{text}");
        }
        assert!(!matches("a/**", "ab") && !matches("a/**", "b/a"));
        assert!(matches("**/b", "b") && matches("**/b", "a/a/b") && !matches("**/b", "b/a"));
        assert!(matches("a/**/b/**/c", "a/x/b/b/y/c") && matches("a/**/b/**/c", "a/b/c"));
        assert!(!matches("a/**/b/**/c", "a/c") && !matches("a/**/b/**/c", "a/c/b"));
    }

    #[test]
    fn a_start_matches_if_something_behind_it_could() {
        let starts = |pattern: &str, start| Segments::parse(pattern, '/').unwrap().matches_start(start, b'/');
        for pattern in ["fal-ai/flux", "fal-ai/flux/dev", "fal-ai/*/dev", "fal-ai/**", "**", "**/dev"] {
            assert!(starts(pattern, "fal-ai/flux"), "{pattern}");
        }
        for pattern in ["fal-ai", "fal-ai/flux2", "fal/**", "fal-ai/fl"] {
            assert!(!starts(pattern, "fal-ai/flux"), "{pattern}");
        }
    }

    #[test]
    fn what_cannot_be_a_pattern_is_refused() {
        for text in ["", "/a", "a//b", "a**", "**a/b", "***"] {
            assert!(Segments::parse(text, '/').is_err(), "{text}");
        }
        assert!(Segments::parse("a/", '/').is_ok());
    }

    /// The obvious matcher, which may take a long time.
    fn obvious(pattern: &[&str], text: &[&str]) -> bool {
        match (pattern, text) {
            ([], text) => text.is_empty(),
            (["**", after @ ..], text) => (0..=text.len()).any(|taken| obvious(after, &text[taken..])),
            ([segment, after @ ..], [first, others @ ..]) => {
                (*segment == "*" && !first.is_empty() || segment == first) && obvious(after, others)
            }
            (_, []) => false,
        }
    }

    proptest! {
        #[test]
        fn it_says_what_the_obvious_matcher_says(
            pattern in prop::collection::vec(prop::sample::select(vec!["a", "b", "*", "**"]), 1..6),
            text in prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..8),
        ) {
            let expected = obvious(&pattern, &text);
            prop_assert_eq!(matches(&pattern.join("/"), &text.join("/")), expected);
        }
    }
}
