//! Names and the suffixes they are under, label by label: `badexample.com` is not under `example.com`.

use url::Host;

/// The most characters of a name, without trailing dot (RFC 1035, 2.3.4; one octet is the first length).
const NAME_MAX: usize = 253;

/// The most characters of a label (RFC 1035, 2.3.4).
const LABEL_MAX: usize = 63;

/// Why a text cannot be the name of a host. The text itself is not repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    /// Nothing, or a dot alone.
    #[error("the name is empty")]
    Empty,
    /// Longer than a name can be.
    #[error("the name has {length} characters, at most {NAME_MAX} are possible")]
    Long {
        /// Characters in it, without trailing dot.
        length: usize,
    },
    /// A label is empty or too long.
    #[error("label {index} of the name has {length} characters, 1 to {LABEL_MAX} are possible")]
    Label {
        /// Which label, counted from 1.
        index: usize,
        /// Characters in it.
        length: usize,
    },
    /// Neither letter, digit, hyphen, underscore nor dot, nor part of an international name.
    #[error("the name holds an impossible character at position {position}")]
    Character {
        /// Its place in bytes, counted from 0.
        position: usize,
    },
    /// The last label is a number, so that it is, or was meant to be, an address
    /// (WHATWG URL, "ends in a number").
    #[error("the name ends in a number as only addresses do")]
    Address,
}

/// The one form in which names are compared: lower case, without trailing dot, an international name by its A-labels
/// (UTS 46, as browsers make them).
///
/// # Errors
/// [`BadName`] if the text cannot be a name.
pub(super) fn canonical(text: &str) -> Result<String, BadName> {
    let Some(position) = text.find(|c: char| !c.is_ascii()) else { return ascii(text) };
    // The URL's parser would take `%` for an escape.
    let bad = BadName::Character { position };
    match Host::parse(text) {
        Ok(Host::Domain(name)) if !text.contains('%') => ascii(&name),
        Ok(Host::Ipv4(_) | Host::Ipv6(_)) => Err(BadName::Address),
        Ok(Host::Domain(_)) | Err(_) => Err(bad),
    }
}

fn ascii(text: &str) -> Result<String, BadName> {
    let name = text.strip_suffix('.').unwrap_or(text);
    if name.is_empty() {
        return Err(BadName::Empty);
    }
    if name.len() > NAME_MAX {
        return Err(BadName::Long { length: name.len() });
    }
    let possible = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if let Some(position) = name.find(|c| !possible(c)) {
        return Err(BadName::Character { position });
    }
    let mut labels = name.split('.').enumerate();
    if let Some((index, label)) = labels.find(|(_, label)| label.is_empty() || label.len() > LABEL_MAX) {
        return Err(BadName::Label { index: index + 1, length: label.len() });
    }
    let last = name.rsplit('.').next().unwrap_or(name);
    if last.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(BadName::Address);
    }
    Ok(name.to_ascii_lowercase())
}

/// A canonical name and all it is under, longest first; the last is the root, `""`.
pub(super) fn suffixes(name: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(name), |suffix| parent(suffix))
}

fn parent(suffix: &str) -> Option<&str> {
    match suffix.split_once('.') {
        Some((_, parent)) => Some(parent),
        None => (!suffix.is_empty()).then_some(""),
    }
}

/// Whether a canonical name is `suffix` or under it. Everything is under the root, `""`.
pub(super) fn is_under(name: &str, suffix: &str) -> bool {
    suffix.is_empty()
        || name.strip_suffix(suffix).is_some_and(|head| head.is_empty() || (head.len() > 1 && head.ends_with('.')))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn case_and_one_trailing_dot_do_not_matter() {
        assert_eq!(canonical("Host_1.Example-2.COM."), Ok(String::from("host_1.example-2.com")));
        assert_eq!(canonical("localhost"), Ok(String::from("localhost")));
    }

    #[test]
    fn international_names_have_their_ascii_form() {
        for (typed, name) in [
            ("B\u{dc}cher.Example.", "xn--bcher-kva.example"),
            ("xn--bcher-kva.example", "xn--bcher-kva.example"),
            ("_a.b\u{fc}cher.example", "_a.xn--bcher-kva.example"),
            ("b\u{fc}cher\u{3002}example", "xn--bcher-kva.example"),
        ] {
            assert_eq!(canonical(typed), Ok(name.to_owned()), "{typed}");
        }
    }

    #[test]
    fn the_longest_names_and_labels_are_names() {
        let label = "a".repeat(63);
        let name = format!("{label}.{label}.{label}.{}", "b".repeat(61));
        assert_eq!(name.len(), 253);
        assert_eq!(canonical(&name), Ok(name.clone()));
        assert_eq!(canonical(&format!("{name}.")), Ok(name.clone()));
        assert_eq!(canonical(&format!("{name}c")), Err(BadName::Long { length: 254 }));
    }

    #[test]
    fn what_is_no_name_says_why() {
        assert_eq!(canonical(""), Err(BadName::Empty));
        assert_eq!(canonical("."), Err(BadName::Empty));
        assert_eq!(canonical("a..b"), Err(BadName::Label { index: 2, length: 0 }));
        assert_eq!(canonical("a.b.."), Err(BadName::Label { index: 3, length: 0 }));
        assert_eq!(canonical(&"a".repeat(64)), Err(BadName::Label { index: 1, length: 64 }));
        assert_eq!(canonical(&"a.".repeat(200)), Err(BadName::Long { length: 399 }));
        assert_eq!(canonical("a b"), Err(BadName::Character { position: 1 }));
        assert_eq!(canonical("b\u{fc} cher.example"), Err(BadName::Character { position: 1 }));
        assert_eq!(canonical("b%41\u{fc}.example"), Err(BadName::Character { position: 4 }));
        assert_eq!(canonical("\u{ff11}\u{ff10}.0.0.1"), Err(BadName::Address));
        assert_eq!(canonical("10.0.0.1"), Err(BadName::Address));
        assert_eq!(canonical("[::1]"), Err(BadName::Character { position: 0 }));
    }

    #[test]
    fn suffixes_go_from_the_name_to_the_root() {
        assert_eq!(suffixes("a.b.c").collect::<Vec<_>>(), ["a.b.c", "b.c", "c", ""]);
    }

    proptest! {
        #[test]
        fn suffixes_match_by_whole_labels(
            name in prop::collection::vec("[ab]{1,2}", 1..5),
            suffix in prop::collection::vec("[ab]{1,2}", 0..4),
        ) {
            let by_labels = name.ends_with(&suffix);
            let (name, suffix) = (name.join("."), suffix.join("."));
            prop_assert_eq!(is_under(&name, &suffix), by_labels);
            prop_assert_eq!(suffixes(&name).any(|parent| parent == suffix), by_labels);
        }

        #[test]
        fn any_text_is_a_name_or_an_error(text in ".{0,300}") {
            if let Ok(name) = canonical(&text) {
                prop_assert_eq!(canonical(&name), Ok(name));
            }
        }
    }
}
