//! Which messages of the connection that stands now are not acknowledged yet, in the order they came. A value
//! without I/O: the subscriber task feeds it and does what it says.
//!
//! Two rules of the protocol are kept here and nowhere else: a PUBACK leaves in the order of the PUBLISHes
//! [MQTT-4.6.0-2], and one for a message of an earlier connection never leaves at all (its packet id may stand
//! for another message by now; the broker sends the message again).

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// What is assumed of a broker until more has been seen: mosquitto sends 20 unacknowledged messages by default
/// (`max_inflight_messages`), and few brokers send less.
pub(super) const USUAL_WINDOW: usize = 20;

/// One received message: the source's position. Means something only within the process that received it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Mark {
    /// Which connection it came on, from 1.
    pub connection: u64,
    /// Its number; grows across connections and restarts.
    pub sequence: u64,
}

/// The unacknowledged messages, each with what is needed to acknowledge it.
#[derive(Debug)]
pub(super) struct Unacknowledged<T> {
    last: Mark,
    waiting: VecDeque<(u64, T)>,
    most: usize,
}

impl<T> Unacknowledged<T> {
    /// Numbers behind `sequence`, so that no two messages of a data directory have the same number.
    pub(super) fn after(sequence: u64) -> Self {
        Self { last: Mark { connection: 0, sequence }, waiting: VecDeque::new(), most: 0 }
    }

    /// A connection stands: what was not acknowledged on the one before will be sent again by the broker.
    pub(super) fn connected(&mut self) -> Mark {
        self.disconnected();
        self.last.connection += 1;
        self.last
    }

    /// The connection is gone, and with it the right to acknowledge what came on it.
    pub(super) fn disconnected(&mut self) {
        self.waiting.clear();
        self.most = 0;
    }

    /// A message has come; `token` is what acknowledges it, none at QoS 0.
    pub(super) fn received(&mut self, token: Option<T>) -> Mark {
        self.last.sequence += 1;
        if let Some(token) = token {
            self.waiting.push_back((self.last.sequence, token));
            self.most = self.most.max(self.waiting.len());
        }
        self.last
    }

    /// Everything up to `mark` is durable: what may be acknowledged now, in order.
    pub(super) fn durable(&mut self, mark: Mark) -> impl Iterator<Item = T> + '_ {
        let count = if mark.connection == self.last.connection {
            self.waiting.partition_point(|(sequence, _)| *sequence <= mark.sequence)
        } else {
            0
        };
        self.waiting.drain(..count).map(|(_, token)| token)
    }

    /// How many unacknowledged messages the broker sends, as far as can be known: the most that have been seen
    /// on this connection, and at least the usual number. `maximum` is what we told the broker, if it listens.
    pub(super) fn window(&self, maximum: Option<usize>) -> usize {
        let seen = self.most.max(USUAL_WINDOW);
        maximum.map_or(seen, |maximum| seen.min(maximum))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acks(unacknowledged: &mut Unacknowledged<u16>, mark: Mark) -> Vec<u16> {
        unacknowledged.durable(mark).collect()
    }

    #[test]
    fn acknowledgements_leave_in_the_order_of_the_messages() {
        let mut fifo = Unacknowledged::after(100);
        fifo.connected();
        let marks: Vec<Mark> = [7, 3, 9, 1].into_iter().map(|id| fifo.received(Some(id))).collect();
        assert_eq!(marks[0], Mark { connection: 1, sequence: 101 });
        assert_eq!(acks(&mut fifo, marks[1]), [7, 3]);
        assert_eq!(acks(&mut fifo, marks[3]), [9, 1]);
    }

    #[test]
    fn a_second_commit_acknowledges_nothing_twice() {
        let mut fifo = Unacknowledged::after(0);
        fifo.connected();
        let mark = fifo.received(Some(1));
        let later = fifo.received(Some(2));
        assert_eq!(acks(&mut fifo, mark), [1]);
        assert!(acks(&mut fifo, mark).is_empty());
        assert_eq!(acks(&mut fifo, later), [2]);
        assert!(acks(&mut fifo, mark).is_empty());
    }

    #[test]
    fn messages_without_acknowledgement_are_numbered_and_passed_over() {
        let mut fifo = Unacknowledged::after(0);
        fifo.connected();
        fifo.received(Some(1));
        let plain = fifo.received(None);
        fifo.received(Some(2));
        assert_eq!(plain.sequence, 2);
        assert_eq!(acks(&mut fifo, plain), [1]);
    }

    #[test]
    fn a_message_of_an_old_connection_is_never_acknowledged() {
        let mut fifo = Unacknowledged::after(0);
        fifo.connected();
        let old = fifo.received(Some(1));
        fifo.received(Some(2));
        fifo.disconnected();
        assert!(acks(&mut fifo, old).is_empty());
        fifo.connected();
        let again = fifo.received(Some(1));
        assert!(acks(&mut fifo, old).is_empty(), "packet id 1 belongs to another message now");
        assert!(acks(&mut fifo, Mark { connection: 1, sequence: again.sequence }).is_empty());
        assert_eq!(acks(&mut fifo, again), [1]);
    }

    #[test]
    fn the_window_is_estimated_for_each_connection() {
        let mut fifo = Unacknowledged::after(0);
        fifo.connected();
        assert_eq!(fifo.window(None), USUAL_WINDOW);
        assert_eq!(fifo.window(Some(5)), 5);
        for id in 0..100 {
            fifo.received(Some(id));
        }
        assert_eq!(fifo.window(None), 100);
        assert_eq!(fifo.window(Some(1024)), 100);
        fifo.connected();
        assert_eq!(fifo.window(None), USUAL_WINDOW);
    }
}
