//! Every figure of the table, in its order, with what is aimed at.

/// What a figure of ours is held to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Aim {
    /// Not above a value.
    AtMost(f64),
    /// Not above this part of the lowest of the others.
    PartOfBest(f64),
    /// Not below this multiple of the highest of the others.
    TimesBest(f64),
    /// Told beside another figure.
    None,
}

/// One row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Figure {
    /// What samples and JSON call it.
    pub(crate) id: &'static str,
    pub(crate) title: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) aim: Aim,
}

const fn row(id: &'static str, title: &'static str, unit: &'static str, aim: Aim) -> Figure {
    Figure { id, title, unit, aim }
}

/// The main table.
pub(crate) const FIGURES: &[Figure] = &[
    row("binary", "binary (tailscaled with its CLI)", "MB", Aim::AtMost(8.0)),
    row("bound", "exec to proxy bound", "ms", Aim::AtMost(5.0)),
    row("first", "exec to first byte", "ms", Aim::None),
    row("register", "  of it headscale's register", "ms", Aim::None),
    row("first-own", "  the rest", "ms", Aim::AtMost(150.0)),
    row("map", "  of that headscale's first answer on the map stream", "ms", Aim::None),
    row("early", "the same, a default route, an early browser", "ms", Aim::None),
    row("early-own", "  but for the register", "ms", Aim::AtMost(150.0)),
    row("distant", "the same, 100 ms round trip to everything", "ms", Aim::None),
    row("distant-own", "  but for headscale's part of the register", "ms", Aim::AtMost(1200.0)),
    row("leave", "logout to gone from headscale's list", "ms", Aim::AtMost(300.0)),
    row("rtt-p50", "round trip of 64 B, p50", "us", Aim::PartOfBest(0.8)),
    row("rtt-p99", "round trip of 64 B, p99", "us", Aim::PartOfBest(0.8)),
    row("rtt-one-p50", "the same, all on one processor, p50", "us", Aim::PartOfBest(0.8)),
    row("rtt-one-p99", "the same, all on one processor, p99", "us", Aim::PartOfBest(0.8)),
    row("rss-idle", "RSS idle", "MiB", Aim::AtMost(8.0)),
    row("cpu-idle", "CPU idle", "%", Aim::AtMost(0.1)),
    row("rss-1000", "RSS with 1,000 idle connections", "MiB", Aim::AtMost(20.0)),
    row("churn", "new connections, 50 at once", "1/s", Aim::TimesBest(2.0)),
    row("churn-cpu", "  CPU each", "us", Aim::AtMost(250.0)),
    row("down-1", "download, 1 flow", "Mbit/s", Aim::TimesBest(1.5)),
    row("down-1-cpu", "  CPU", "s/GB", Aim::AtMost(2.5)),
    row("down-1-far", "  the far end's CPU", "s/GB", Aim::None),
    row("up-1", "upload, 1 flow", "Mbit/s", Aim::TimesBest(1.3)),
    row("up-1-cpu", "  CPU", "s/GB", Aim::AtMost(2.5)),
    row("up-1-far", "  the far end's CPU", "s/GB", Aim::None),
    row("rss-bulk-1", "RSS after bulk, 1 flow", "MiB", Aim::AtMost(30.0)),
    row("down-50", "download, 50 flows", "Mbit/s", Aim::TimesBest(1.2)),
    row("down-50-cpu", "  CPU", "s/GB", Aim::AtMost(5.0)),
    row("down-50-far", "  the far end's CPU", "s/GB", Aim::None),
    row("up-50", "upload, 50 flows", "Mbit/s", Aim::TimesBest(1.2)),
    row("up-50-cpu", "  CPU", "s/GB", Aim::AtMost(4.0)),
    row("up-50-far", "  the far end's CPU", "s/GB", Aim::None),
    row("rss-bulk-50", "RSS after bulk, 50 flows", "MiB", Aim::AtMost(120.0)),
    row("derp-rtt", "round trip over DERP, p50", "us", Aim::PartOfBest(0.7)),
    row("derp-down", "over DERP, download, 1 flow", "Mbit/s", Aim::TimesBest(1.5)),
    row("derp-down-cpu", "  CPU", "s/GB", Aim::PartOfBest(0.3)),
    row("derp-up", "over DERP, upload, 1 flow", "Mbit/s", Aim::TimesBest(1.5)),
    row("derp-up-cpu", "  CPU", "s/GB", Aim::PartOfBest(0.3)),
    row("crowd-p99", "10,000 connections, 100 new at once: first byte, p99", "ms", Aim::AtMost(1000.0)),
    row("crowd-rss", "  RSS when all are open", "MiB", Aim::None),
    row("burst-p99", "  all 10,000 asked for at one moment, p99", "ms", Aim::None),
    row("fleet", "100 sidecars, all ready", "s", Aim::AtMost(10.0)),
    row("fleet-memory", "  memory together (PSS)", "MiB", Aim::AtMost(1024.0)),
];
