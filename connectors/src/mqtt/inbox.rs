//! The bounded hand-over between the task that polls a connection and the source that the engine pulls. One task
//! puts, one takes. What happens when it is full is decided by who puts: see `subscriber`.
//!
//! A channel would not do: the oldest message may have to make room, and messages of a connection that broke are
//! taken back when the broker is going to send them again.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;

use super::ack::Mark;
use super::client::Message;

/// A message that has arrived.
pub(super) struct Arrival {
    pub message: Message,
    pub mark: Mark,
    /// Is sent again by the broker when it is not acknowledged.
    pub kept: bool,
    /// Milliseconds since 1970, UTC.
    pub time: i64,
    pub ingest: Instant,
}

impl Arrival {
    fn bytes(&self) -> usize {
        self.message.payload().len() + self.message.topic().len()
    }
}

/// What the source must know of the connection to tell whether the broker's window is full.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Window {
    /// How many unacknowledged messages the broker sends.
    pub size: usize,
    /// Where the connection began: older messages do not count against its window.
    pub since: Mark,
}

#[derive(Default)]
struct Held {
    queue: VecDeque<Arrival>,
    bytes: usize,
    window: Window,
    /// Why nothing will ever come again.
    ended: Option<String>,
}

/// Messages that have arrived and were not pulled yet.
pub(super) struct Inbox {
    held: Mutex<Held>,
    arrived: Notify,
    room: Notify,
    most_messages: usize,
    most_bytes: usize,
}

impl Inbox {
    pub(super) fn new(most_messages: usize, most_bytes: usize) -> Self {
        Self { held: Mutex::default(), arrived: Notify::new(), room: Notify::new(), most_messages, most_bytes }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No further message should be read from the connection.
    pub(super) fn is_full(&self) -> bool {
        let held = self.held();
        held.queue.len() >= self.most_messages || held.bytes >= self.most_bytes
    }

    /// Adds a message, full or not.
    pub(super) fn put(&self, arrival: Arrival, window: Window) {
        let mut held = self.held();
        held.bytes += arrival.bytes();
        held.queue.push_back(arrival);
        held.window = window;
        drop(held);
        self.arrived.notify_one();
    }

    /// Drops the oldest message if nobody would send it again; false when there is none to drop.
    pub(super) fn drop_oldest(&self) -> bool {
        let mut held = self.held();
        if held.queue.front().is_none_or(|arrival| arrival.kept) {
            return false;
        }
        if let Some(dropped) = held.queue.pop_front() {
            held.bytes -= dropped.bytes();
        }
        true
    }

    /// A new connection stands. When the broker kept the session, what waits here and was not acknowledged will
    /// come again on it, so it is taken back: one copy is enough.
    pub(super) fn reconnected(&self, window: Window, session_present: bool) {
        let mut held = self.held();
        held.window = window;
        if session_present {
            held.queue.retain(|arrival| !arrival.kept);
            held.bytes = held.queue.iter().map(Arrival::bytes).sum();
        }
        drop(held);
        self.room.notify_one();
    }

    /// Nothing will come any more.
    pub(super) fn end(&self, why: String) {
        self.held().ended.get_or_insert(why);
        self.arrived.notify_one();
    }

    /// Waits until there is room.
    pub(super) async fn room(&self) {
        while self.is_full() {
            self.room.notified().await;
        }
    }

    /// Waits for a message, then takes what is there, up to so many messages and (but for the first) bytes, in
    /// the order of arrival. Cancel-safe: nothing is taken before the last await.
    ///
    /// # Errors
    /// Why nothing will come any more.
    pub(super) async fn take(&self, rows: usize, bytes: usize) -> Result<(Vec<Arrival>, Window), String> {
        loop {
            {
                let mut held = self.held();
                if !held.queue.is_empty() {
                    let mut taken = Vec::with_capacity(held.queue.len().min(rows));
                    let mut size = 0;
                    while taken.len() < rows && size < bytes {
                        let Some(arrival) = held.queue.pop_front() else { break };
                        size += arrival.bytes();
                        taken.push(arrival);
                    }
                    held.bytes -= size;
                    let window = held.window;
                    drop(held);
                    self.room.notify_one();
                    return Ok((taken, window));
                }
                if let Some(why) = &held.ended {
                    return Err(why.clone());
                }
            }
            self.arrived.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival(sequence: u64, size: usize, kept: bool) -> Arrival {
        let message = Message::V311(rumqttc::Publish::new("t", rumqttc::QoS::AtMostOnce, vec![0; size]));
        Arrival { message, mark: Mark { connection: 1, sequence }, kept, time: 0, ingest: Instant::now() }
    }

    fn put(inbox: &Inbox, sequence: u64, size: usize, kept: bool) {
        inbox.put(arrival(sequence, size, kept), Window::default());
    }

    async fn taken(inbox: &Inbox, rows: usize, bytes: usize) -> Vec<u64> {
        inbox.take(rows, bytes).await.unwrap().0.iter().map(|arrival| arrival.mark.sequence).collect()
    }

    #[tokio::test]
    async fn what_is_there_is_taken_in_order_up_to_the_limits() {
        let inbox = Inbox::new(100, 1_000_000);
        for sequence in 1..=5 {
            put(&inbox, sequence, 100, true);
        }
        assert_eq!(taken(&inbox, 2, 1_000_000).await, [1, 2]);
        assert_eq!(taken(&inbox, 10, 101).await, [3]);
        assert_eq!(taken(&inbox, 10, 1).await, [4]);
        assert_eq!(taken(&inbox, 10, 1_000).await, [5]);
        inbox.end("gone".into());
        assert_eq!(inbox.take(1, 1).await.err().as_deref(), Some("gone"));
    }

    #[tokio::test]
    async fn it_is_full_by_messages_or_by_bytes_and_says_when_there_is_room() {
        let inbox = Inbox::new(2, 1_000);
        put(&inbox, 1, 10, true);
        assert!(!inbox.is_full());
        put(&inbox, 2, 10, true);
        assert!(inbox.is_full());
        taken(&inbox, 1, 1).await;
        inbox.room().await;
        put(&inbox, 3, 2_000, true);
        assert!(inbox.is_full());
        taken(&inbox, 9, 9_999).await;
        assert!(!inbox.is_full());
    }

    #[tokio::test]
    async fn only_messages_that_nobody_keeps_make_room() {
        let inbox = Inbox::new(10, 1_000);
        put(&inbox, 1, 1, false);
        put(&inbox, 2, 1, true);
        assert!(inbox.drop_oldest());
        assert!(!inbox.drop_oldest());
        assert_eq!(taken(&inbox, 9, 99).await, [2]);
    }

    #[tokio::test]
    async fn a_kept_session_takes_back_what_comes_again() {
        let inbox = Inbox::new(10, 1_000);
        put(&inbox, 1, 1, true);
        put(&inbox, 2, 1, false);
        inbox.reconnected(Window::default(), true);
        put(&inbox, 3, 1, true);
        assert_eq!(taken(&inbox, 9, 99).await, [2, 3]);
        put(&inbox, 4, 1, true);
        inbox.reconnected(Window::default(), false);
        assert_eq!(taken(&inbox, 9, 99).await, [4]);
    }
}
