//! Logs on standard error: text for people, or one JSON object a line.
//!
//! Every line passes [`redact`] on its way out, whatever put it there.

use std::fmt;
use std::io::{self, IsTerminal, Write};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormattedFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use super::args::LogFormat;
use super::redact::redact;
use super::settings::Output;

/// Starts logging for the rest of the process. A second call changes nothing.
pub(super) fn start(output: &Output) {
    let filter = targets(&output.log_filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(|| Redacted);
    let registry = tracing_subscriber::registry();
    let started = match output.log_format {
        LogFormat::Json => {
            let format = JsonLine { run_id: output.run_id.clone() };
            let layer = layer.fmt_fields(JsonFields::new()).event_format(format);
            registry.with(layer.with_filter(filter)).try_init()
        }
        LogFormat::Text => registry.with(layer.with_ansi(coloured()).with_filter(filter)).try_init(),
    };
    // Only tests come here twice.
    drop(started);
}

/// Whether standard error takes colours: a terminal, and nobody objects (no-color.org).
pub(super) fn coloured() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A bare level is for our own modules; libraries speak only when directives name them. The text was checked before.
fn targets(text: &str) -> Targets {
    let directives =
        if text.contains(['=', ',']) { text.to_owned() } else { format!("error,boringtun=off,tailcar={text}") };
    directives.parse().unwrap_or_default()
}

/// Standard error behind [`redact`]. A reader that went away is no reason to stop.
struct Redacted;

impl Write for Redacted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // The subscriber hands over a whole line at once.
        let text = String::from_utf8_lossy(bytes);
        let _ = io::stderr().lock().write_all(redact(&text).as_bytes());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One event as one JSON object: `ts`, `level`, `run_id`, `module`, `msg`, then the event's fields and its spans.
struct JsonLine {
    run_id: String,
}

impl<S> FormatEvent<S, JsonFields> for JsonLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = Map::new();
        line.insert("ts".into(), jiff::Timestamp::now().to_string().into());
        line.insert("level".into(), event.metadata().level().as_str().to_ascii_lowercase().into());
        line.insert("run_id".into(), self.run_id.clone().into());
        line.insert("module".into(), event.metadata().target().into());
        for span in context.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            let fields = span.extensions().get::<FormattedFields<JsonFields>>().map(|fields| fields.fields.clone());
            let fields = fields.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or(Value::Null);
            line.insert(span.name().into(), fields);
        }
        event.record(&mut Fields(&mut line));
        writeln!(writer, "{}", Value::Object(line))
    }
}

/// Collects an event's fields; the message is `msg`.
struct Fields<'a>(&'a mut Map<String, Value>);

impl Fields<'_> {
    fn put(&mut self, field: &Field, value: Value) {
        let name = if field.name() == "message" { "msg" } else { field.name() };
        self.0.insert(name.to_owned(), value);
    }
}

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl Write for Memory {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no test panics while it writes").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_json_line_holds_the_event_its_fields_and_its_spans() {
        let memory = Memory::default();
        let writer = memory.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .fmt_fields(JsonFields::new())
            .event_format(JsonLine { run_id: String::from("r1") })
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            let _span = tracing::info_span!("conn", id = 7).entered();
            tracing::warn!(code = "TC-1203", ms = 12, "refused");
        });
        let bytes = memory.0.lock().unwrap().clone();
        let line: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!((&line["level"], &line["run_id"], &line["msg"]), (&"warn".into(), &"r1".into(), &"refused".into()));
        assert_eq!((&line["code"], &line["ms"], &line["conn"]["id"]), (&"TC-1203".into(), &12.into(), &7.into()));
        assert!(line["ts"].as_str().unwrap().ends_with('Z'));
    }

    #[test]
    fn a_bare_level_is_for_our_modules() {
        assert_eq!(targets("debug").to_string(), "boringtun=off,tailcar=debug,error");
        assert_eq!(targets("tailcar::node=trace").to_string(), "tailcar::node=trace");
    }
}
