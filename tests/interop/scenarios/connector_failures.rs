//! App connectors that stop, come back, or are said to be offline.

use std::time::{Duration, Instant};

use libtest_mimic::Failed;

use super::app_connectors::{SLACK, fails, served, with_apps};
use super::connector_routes::online;
use crate::apps::Which;
use crate::bed::Bed;
use crate::process::until;

/// How long the connector that was asked last has the question for itself.
const HEAD_START: Duration = Duration::from_millis(1500);

/// Of several connectors the first that answers is asked, and kept; one that control calls offline only after all others.
pub(crate) fn of_several_connectors_one_is_asked_and_an_offline_one_is_not(bed: &Bed) -> Result<(), Failed> {
    with_apps(bed, |apps| {
        let sidecar = apps.launch(bed).ready()?;
        let asked = || {
            let (name, _) = apps.fresh('n', "both.test");
            served(&sidecar, &name)?;
            Ok::<_, Failed>([Which::First, Which::Second].map(|which| apps.asked(&name, which) > 0))
        };
        for (offline, other) in [(Which::First, Which::Second), (Which::Second, Which::First)] {
            online(apps, other, true)?;
            online(apps, offline, false)?;
            until(Duration::from_secs(5), "the other one alone to be asked", || {
                Ok((asked()? == [other == Which::First, other == Which::Second]).then_some(()))
            })?;
            // Back, and no reason to change.
            online(apps, offline, true)?;
            let kept = asked()?;
            if kept != [other == Which::First, other == Which::Second] {
                return Err(format!("{other:?} worked, but asked were (conn, conn2): {kept:?}").into());
            }
        }
        Ok(())
    })
}

/// A connector stops without a word: the second one for the suffix takes over, what only it served ends by a code, and
/// all is well again when it has come back.
pub(crate) fn a_connector_that_stops_is_replaced_until_it_is_back(bed: &Bed) -> Result<(), Failed> {
    with_apps(bed, |apps| {
        let sidecar = apps.launch(bed).ready()?;
        let hasty = apps.launch(bed).args(&["--dial-timeout", "4s"]).ready()?;
        for sidecar in [&sidecar, &hasty] {
            served(sidecar, "web.app.test")?;
        }
        // So that it is the one that is asked first.
        online(apps, Which::Second, false)?;
        let (name, _) = apps.fresh('n', "both.test");
        served(&sidecar, &name)?;
        online(apps, Which::Second, true)?;
        apps.connector(Which::First).process.end();
        let (name, _) = apps.fresh('n', "both.test");
        let start = Instant::now();
        let (by, _) = served(&sidecar, &name)?;
        if by != Which::Second.address() || start.elapsed() > HEAD_START + SLACK {
            return Err(format!("{name} was served by {by} after {:?}", start.elapsed()).into());
        }
        let (name, _) = apps.fresh('n', "app.test");
        // Whether control calls it offline by then or not, it is named, and what is known of it.
        let text = fails(&hasty, &name, &["TC-1404", "TC-1405"], Duration::from_secs(8))?;
        if !["nothing has come from conn.", "conn.tb.example, which leads there, "].iter().any(|why| text.contains(why))
        {
            return Err(text.into());
        }
        apps.restart(bed, Which::First)?;
        apps.offer(&[])?;
        let (name, _) = apps.fresh('n', "app.test");
        until(Duration::from_secs(10), "the connector to serve again", || Ok(served(&sidecar, &name).ok())).map(drop)
    })
}
