//! How long something took or may take, as a person reads it: as exact as it helps, and no more.

use std::fmt;
use std::time::Duration;

/// A duration in messages: `40ms`, `2.5s`, `30s`, `3m20s`, `1h`.
#[derive(Debug, Clone, Copy)]
pub struct Lapse(pub Duration);

impl fmt::Display for Lapse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_nanos().saturating_add(500_000) / 1_000_000;
        let (tenths, seconds) = ((ms + 50) / 100, (ms + 500) / 1_000);
        match (seconds / 3_600, seconds / 60 % 60, seconds % 60) {
            _ if ms < 1_000 => write!(f, "{ms}ms"),
            _ if tenths < 100 && tenths % 10 != 0 => write!(f, "{}.{}s", tenths / 10, tenths % 10),
            (0, 0 | 1, _) => write!(f, "{seconds}s"),
            (0, minutes, 0) => write!(f, "{minutes}m"),
            (0, minutes, rest) => write!(f, "{minutes}m{rest}s"),
            (hours, 0, 0) => write!(f, "{hours}h"),
            (hours, minutes, 0) => write!(f, "{hours}h{minutes}m"),
            (hours, minutes, rest) => write!(f, "{hours}h{minutes}m{rest}s"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_as_exact_as_a_person_reads_them() {
        for (nanos, text) in [
            (0, "0ms"),
            (40_400_000, "40ms"),
            (999_400_000, "999ms"),
            (999_600_000, "1s"),
            (2_512_345_678, "2.5s"),
            (9_949_000_000, "9.9s"),
            (9_960_000_000, "10s"),
            (30_001_122_288, "30s"),
            (90_000_000_000, "90s"),
            (119_700_000_000, "2m"),
            (180_000_000_000, "3m"),
            (200_000_000_000, "3m20s"),
            (3_600_000_000_000, "1h"),
            (86_400_000_000_000, "24h"),
            (5_400_000_000_000, "1h30m"),
            (3_630_000_000_000, "1h0m30s"),
            (3_661_000_000_000, "1h1m1s"),
        ] {
            assert_eq!(Lapse(Duration::from_nanos(nanos)).to_string(), text);
        }
    }
}
