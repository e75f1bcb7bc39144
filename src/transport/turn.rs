//! The end of a task's turn on a thread that others share.

use std::pin::pin;
use std::task::{Context, Poll};

use tokio::task::yield_now;

/// Has the task come back after all others, and after the runtime has looked at its sockets and timers. Waking it
/// would not do: a thread whose queue of tasks is never empty looks at those only after every 61st.
pub fn end(cx: &mut Context<'_>) {
    let later: Poll<()> = pin!(yield_now()).poll(cx);
    debug_assert!(later.is_pending(), "the first poll only has the task come back");
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::poll_fn;
    use std::rc::Rc;
    use std::time::Duration;

    use tokio::runtime::{Builder, LocalOptions};

    use super::*;

    #[test]
    fn a_task_whose_turns_never_stop_leaves_the_timers_theirs() {
        let mut builder = Builder::new_current_thread();
        let runtime = builder.enable_all().event_interval(u32::MAX).build_local(LocalOptions::default()).unwrap();
        runtime.block_on(async {
            let over = Rc::new(Cell::new(false));
            let busy = over.clone();
            let task = tokio::task::spawn_local(poll_fn(move |cx| {
                if busy.get() {
                    return Poll::Ready(());
                }
                end(cx);
                Poll::Pending
            }));
            tokio::task::spawn_local(async move {
                tokio::time::sleep(Duration::from_millis(1)).await;
                over.set(true);
            });
            task.await.unwrap();
        });
    }
}
