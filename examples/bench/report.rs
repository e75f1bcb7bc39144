//! Samples, their medians, and the table with its ratios, as text and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::{fs, io};

use serde_json::{Value, json};

use crate::contender::Contender;
use crate::figures::{Aim, FIGURES, Figure};

/// All that was measured.
#[derive(Debug, Default)]
pub(crate) struct Report {
    samples: BTreeMap<(&'static str, Contender), Vec<f64>>,
    /// Who could not be measured, and why.
    skipped: Vec<(Contender, String)>,
    /// What went wrong in a row, told below the table.
    notes: Vec<String>,
}

impl Report {
    /// Adds a sample of a figure; infinity is "never".
    pub(crate) fn add(&mut self, id: &'static str, contender: Contender, value: f64) {
        debug_assert!(FIGURES.iter().any(|figure| figure.id == id), "{id} has no row");
        self.samples.entry((id, contender)).or_default().push(value);
    }

    /// Leaves a contender out.
    pub(crate) fn skip(&mut self, contender: Contender, why: String) {
        self.skipped.push((contender, why));
    }

    /// Tells something below the table.
    pub(crate) fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    fn median(&self, id: &'static str, contender: Contender) -> Option<f64> {
        self.samples.get(&(id, contender)).and_then(|samples| median(samples))
    }

    /// The table for people.
    pub(crate) fn table(&self, contenders: &[Contender]) -> String {
        let mut out = format!("{:<54}{:<8}", "", "");
        for contender in contenders {
            let _ = write!(out, "{:>15}", contender.name());
        }
        let _ = writeln!(out, "{:>9}{:>14}      N", "ratio", "aim");
        for figure in FIGURES {
            self.line(&mut out, figure, contenders);
        }
        for (contender, why) in &self.skipped {
            let _ = writeln!(out, "SKIP {}: {why}", contender.name());
        }
        for note in &self.notes {
            let _ = writeln!(out, "{note}");
        }
        out
    }

    fn line(&self, out: &mut String, figure: &Figure, contenders: &[Contender]) {
        let medians: Vec<_> = contenders.iter().map(|contender| self.median(figure.id, *contender)).collect();
        if medians.iter().all(Option::is_none) {
            return;
        }
        let _ = write!(out, "{:<54}{:<8}", figure.title, figure.unit);
        for median in &medians {
            let _ = write!(out, "{:>15}", median.map_or("-".to_owned(), number));
        }
        let ratio = self.ratio(figure).map_or("-".to_owned(), |ratio| format!("{ratio:.2}x"));
        let aim = match figure.aim {
            Aim::AtMost(limit) => format!("<= {}", number(limit)),
            Aim::PartOfBest(part) => format!("<= {part}x"),
            Aim::TimesBest(times) => format!(">= {times}x"),
            Aim::None => String::new(),
        };
        let met = match self.met(figure) {
            Some(true) => "met",
            Some(false) => "NOT",
            None => "",
        };
        let counts = contenders.iter().filter_map(|contender| self.samples.get(&(figure.id, *contender)));
        let rounds = counts.map(Vec::len).max().unwrap_or(0);
        let _ = writeln!(out, "{ratio:>9}{aim:>14} {met:<4}{rounds:>3}");
    }

    /// Ours to the better of the others, which is the higher one where more is better.
    fn ratio(&self, figure: &Figure) -> Option<f64> {
        let ours = self.median(figure.id, Contender::Tailcar)?;
        let others =
            [Contender::Tailscaled, Contender::Meshd].into_iter().filter_map(|other| self.median(figure.id, other));
        let best = match figure.unit {
            "Mbit/s" | "1/s" => others.reduce(f64::max)?,
            _ => others.reduce(f64::min)?,
        };
        Some(ours / best).filter(|ratio| ratio.is_finite())
    }

    fn met(&self, figure: &Figure) -> Option<bool> {
        match figure.aim {
            Aim::AtMost(limit) => Some(self.median(figure.id, Contender::Tailcar)? <= limit),
            Aim::PartOfBest(part) => Some(self.ratio(figure)? <= part),
            Aim::TimesBest(times) => Some(self.ratio(figure)? >= times),
            Aim::None => None,
        }
    }

    /// The same with every sample, for programs.
    pub(crate) fn json(&self) -> Value {
        let figures: Vec<_> = FIGURES
            .iter()
            .filter_map(|figure| {
                let samples: BTreeMap<_, _> = self
                    .samples
                    .iter()
                    .filter(|((id, _), _)| *id == figure.id)
                    .map(|((_, contender), samples)| {
                        (contender.name(), json!({"median": median(samples), "samples": samples}))
                    })
                    .collect();
                (!samples.is_empty()).then(|| {
                    json!({
                        "id": figure.id, "title": figure.title.trim(), "unit": figure.unit,
                        "contenders": samples, "ratio": self.ratio(figure), "met": self.met(figure),
                    })
                })
            })
            .collect();
        let skipped: Vec<_> = self.skipped.iter().map(|(who, why)| json!({"who": who.name(), "why": why})).collect();
        json!({"figures": figures, "skipped": skipped, "notes": self.notes})
    }
}

/// Writes JSON for programs.
///
/// # Errors
/// Those of writing.
pub(crate) fn write(path: &Path, value: &Value) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, format!("{value:#}\n"))
}

/// The middle sample, or the mean of the two in the middle.
pub(crate) fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted.len().checked_sub(1)? / 2, sorted.len() / 2);
    if sorted[low] == sorted[high] { Some(sorted[low]) } else { Some(f64::midpoint(sorted[low], sorted[high])) }
}

/// A number with three digits that mean something.
pub(crate) fn number(value: f64) -> String {
    match value {
        value if value.is_infinite() => "never".to_owned(),
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_of_sorted_samples() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
        assert_eq!(median(&[f64::INFINITY, f64::INFINITY]), Some(f64::INFINITY));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_rate_is_held_to_the_highest_of_the_others_and_a_time_to_the_lowest() {
        let mut report = Report::default();
        for (id, values) in [("churn", [300.0, 100.0, 200.0]), ("rtt-p50", [300.0, 100.0, 200.0])] {
            for (contender, value) in
                [Contender::Tailcar, Contender::Tailscaled, Contender::Meshd].into_iter().zip(values)
            {
                report.add(id, contender, value);
            }
        }
        let figure = |id| FIGURES.iter().find(|figure| figure.id == id).unwrap();
        assert_eq!(report.ratio(figure("churn")), Some(1.5));
        assert_eq!(report.ratio(figure("rtt-p50")), Some(3.0));
        assert_eq!(report.met(figure("churn")), Some(false));
    }
}
