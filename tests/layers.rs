//! The layers of the house, held by reading the sources: who may name whom, and what the pure modules do without.
//!
//! The order is that of `src/lib.rs`. A module names only modules of lower layers, so nothing here can become a cycle.

use std::fs;
use std::path::{Path, PathBuf};

/// Modules by layer, low to high. Two of one layer do not know each other.
const LAYERS: &[&[&str]] = &[
    &["key", "lapse"],
    &["wire"],
    &["netmap"],
    &["dns", "engine", "netstack"],
    &["transport"],
    &["control", "provision"],
    &["node"],
    &["fault"],
    &["connector", "proxy", "verify"],
    &["admin", "lab"],
    &["cli"],
];

/// The layers up to this one take time and randomness as arguments and do no input or output.
const PURE: usize = 3;

/// What would end a pure module's determinism. Addresses of `std::net` are values and stay allowed.
const BANNED: &[(&str, &str)] = &[
    ("Instant::now", "the clock"),
    ("SystemTime", "the clock"),
    ("Timestamp::now", "the clock"),
    ("TcpStream", "the network"),
    ("TcpListener", "the network"),
    ("UdpSocket", "the network"),
    ("UnixStream", "the network"),
    ("tokio::", "the runtime"),
    ("std::thread", "the runtime"),
    ("std::fs", "files"),
    ("std::env", "files"),
    ("std::process", "files"),
    ("reqwest::", "the network"),
    ("hyper::", "the network"),
    ("rustix::", "the system"),
];

/// Libraries that only one place may know.
const CONFINED: &[(&str, &str)] = &[("boringtun::noise", "src/engine/wireguard/")];

/// Nine files of ten are shorter than the first, and all than the second: a longer one has two subjects.
const LINES: (usize, usize) = (400, 500);

/// One source file, without comments and tests.
struct Source {
    path: PathBuf,
    /// Its place in the crate: `["node", "dial"]`; empty for the roots.
    module: Vec<String>,
    text: String,
    code: String,
}

#[test]
fn modules_name_only_lower_layers() {
    let mut wrong = Vec::new();
    for source in sources() {
        let Some(own) = source.module.first() else { continue };
        let Some(layer) = rank(own) else {
            wrong.push(format!("{}: {own} has no layer", source.path.display()));
            continue;
        };
        for named in named_modules(&source) {
            match rank(&named) {
                Some(other) if other < layer || named == *own => {}
                Some(_) => wrong.push(format!("{}: {own} names {named}, which is not lower", source.path.display())),
                None => wrong.push(format!("{}: crate::{named} has no layer", source.path.display())),
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn pure_modules_know_neither_clock_nor_network_nor_runtime_nor_files() {
    let mut wrong = Vec::new();
    for source in sources() {
        if source.module.first().and_then(|own| rank(own)).is_some_and(|layer| layer <= PURE) {
            for (word, what) in BANNED.iter().filter(|(word, _)| source.code.contains(word)) {
                wrong.push(format!("{}: {word} is {what}", source.path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn a_library_with_quirks_has_one_home() {
    let mut wrong = Vec::new();
    for source in sources() {
        let path = source.path.display().to_string();
        for (word, home) in CONFINED.iter().filter(|(word, home)| source.code.contains(word) && !path.contains(home)) {
            wrong.push(format!("{path}: {word} belongs to {home}"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn files_are_short_and_say_what_they_are() {
    let (most, all) = LINES;
    let (mut wrong, sources) = (Vec::new(), sources());
    let long = sources.iter().filter(|source| source.text.lines().count() > most).count();
    if long * 10 > sources.len() {
        wrong.push(format!("{long} of {} files have more than {most} lines", sources.len()));
    }
    for source in sources {
        let lines = source.text.lines().count();
        if lines > all {
            wrong.push(format!("{}: {lines} lines, {all} at most", source.path.display()));
        }
        if !source.text.starts_with("//!") {
            wrong.push(format!("{}: does not begin with what it is", source.path.display()));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

fn rank(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

/// The top modules that a file names by `crate::` or by climbing out of its own with `super::`.
fn named_modules(source: &Source) -> Vec<String> {
    let mut named = Vec::new();
    for (at, _) in source.code.match_indices("crate::") {
        if !source.code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            named.extend(first_names(&source.code[at + "crate::".len()..]));
        }
    }
    for (at, _) in source.code.match_indices("super::") {
        let before = &source.code[..at];
        if before.ends_with("super::") || before.ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let rest = &source.code[at..];
        let climbs = rest.as_bytes().chunks(7).take_while(|chunk| *chunk == b"super::").count();
        if climbs >= source.module.len() {
            named.extend(first_names(&rest[climbs * 7..]));
        }
    }
    // What is not a module is an item of the root, such as a macro; the root has none.
    named.retain(|name| name.starts_with(char::is_lowercase));
    named
}

/// `a` of `a::b`, or `a` and `c` of `{a::{b, x}, c::d}`.
fn first_names(path: &str) -> Vec<String> {
    let ident = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let Some(list) = path.strip_prefix('{') else { return vec![ident(path)] };
    let (mut depth, mut start, mut names) = (0, 0, Vec::new());
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                names.push(ident(list[start..at].trim()));
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                names.push(ident(list[start..at].trim()));
                start = at + 1;
            }
            _ => {}
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

/// Every file below `src` but those that only tests see.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    collect(&root, &mut paths);
    paths.sort();
    let all: Vec<Source> = paths.into_iter().map(|path| read(&root, path)).collect();
    let for_tests: Vec<Vec<String>> = all.iter().flat_map(test_modules).collect();
    all.into_iter().filter(|source| !for_tests.iter().any(|module| source.module.starts_with(module))).collect()
}

fn collect(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("src can be listed") {
        let path = entry.expect("src can be listed").path();
        if path.is_dir() {
            collect(&path, paths);
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            paths.push(path);
        }
    }
}

fn read(root: &Path, path: PathBuf) -> Source {
    let text = fs::read_to_string(&path).expect("a source is text");
    let mut module: Vec<String> = path
        .strip_prefix(root)
        .expect("it was found below src")
        .with_extension("")
        .iter()
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    module.retain(|part| part != "mod");
    if module == ["lib"] || module == ["main"] {
        module.clear();
    }
    let code = without_comments(text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default());
    Source { path, module, text, code }
}

/// Modules declared as `#[cfg(test)] mod NAME;`.
fn test_modules(source: &Source) -> Vec<Vec<String>> {
    let declared = source.text.split("#[cfg(test)]\n").skip(1).filter_map(|rest| {
        let (name, _) = rest.strip_prefix("pub(crate) ").unwrap_or(rest).strip_prefix("mod ")?.split_once(';')?;
        name.chars().all(|c| c.is_alphanumeric() || c == '_').then(|| name.to_owned())
    });
    declared.map(|name| source.module.iter().cloned().chain([name]).collect()).collect()
}

fn without_comments(text: &str) -> String {
    let lines = text.lines().map(|line| match line.find("//") {
        // `https://` in a string is no comment.
        Some(at) if !line[..at].ends_with(':') => &line[..at],
        Some(_) | None => line,
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_in_paths_and_lists() {
        assert_eq!(first_names("node::dial::x"), ["node"]);
        assert_eq!(first_names("{node::{a, b}, key::K, wire}"), ["node", "key", "wire"]);
    }

    #[test]
    fn climbing_out_of_a_module_is_naming_another() {
        let module = vec![String::from("node"), String::from("dial")];
        let source = |code: &str| Source {
            path: PathBuf::new(),
            module: module.clone(),
            text: String::new(),
            code: code.to_owned(),
        };
        assert_eq!(named_modules(&source("use super::resolve;")), Vec::<String>::new());
        assert_eq!(named_modules(&source("use super::super::cli;")), ["cli"]);
        assert_eq!(named_modules(&source("let x = crate::wire::y();")), ["wire"]);
    }
}
