//! The task that keeps a sink's connection: publishes what the sink hands over, learns from the broker what has
//! arrived there, and after a broken connection publishes again what has not. It remembers every message until
//! the broker has acknowledged it, because the client library forgets them with the session.
//!
//! It waits in one `select` for the connection and for new messages, and takes new messages only while fewer than
//! the agreed number are unacknowledged; so what is in flight is bounded here, and what waits by the channel.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use afferent_engine::Rejected;
use arrow::array::RecordBatch;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::client::{self, Broken, Client, Event};
use super::config::{Dial, Qos};
use super::subscriber::{Standing, pause};
use crate::refused::Refusals;

/// A connection that stood this long was a good one: the next attempt comes soon.
const GOOD_CONNECTION: Duration = Duration::from_secs(20);
/// See `subscriber`: a poll that yields nothing for so long is stuck.
const STUCK: Duration = Duration::from_secs(15);
/// After so many connections in a row that broke before the broker acknowledged anything, messages are sent one
/// at a time: one of them may be what the broker cannot stand.
const SUSPICIOUS: u32 = 3;
/// After so many, the message that was alone on the connection each time is refused. With the growing pauses
/// between attempts this takes minutes, which a broker in trouble needs more often than a message is poison.
const POISON: u32 = 10;

/// A message on its way.
pub(super) struct Outgoing {
    pub topic: String,
    pub payload: Vec<u8>,
    /// The row it was made from, for the case that the broker refuses it.
    pub batch: Arc<RecordBatch>,
    pub row: usize,
}

impl Outgoing {
    /// Bytes that count against the limit of what is in flight.
    pub(super) fn bytes(&self) -> u64 {
        (self.topic.len() + self.payload.len()) as u64
    }
}

/// How much the broker has settled: acknowledged, or refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Settled {
    pub messages: u64,
    pub bytes: u64,
}

/// The unsettled messages in the order of publishing. A value without I/O.
#[derive(Default)]
pub(super) struct InFlight {
    queue: VecDeque<(Outgoing, Option<u16>)>,
    /// How many from the front are in the library's hands, and how many of those have a packet id.
    handed_over: usize,
    numbered: usize,
}

impl InFlight {
    pub(super) fn push(&mut self, message: Outgoing) {
        self.queue.push_back((message, None));
    }

    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    /// The next message that the library does not have yet.
    pub(super) fn next(&self) -> Option<&Outgoing> {
        self.queue.get(self.handed_over).map(|(message, _)| message)
    }

    /// It has the next message now.
    pub(super) fn handed_over(&mut self) {
        self.handed_over += 1;
    }

    /// How many the library has.
    pub(super) fn outstanding(&self) -> usize {
        self.handed_over
    }

    /// The library gave the oldest message without a packet id this one. At QoS 0 (id 0) the message is settled.
    pub(super) fn published(&mut self, packet: u16) -> Option<Outgoing> {
        if packet == 0 {
            return self.remove(0);
        }
        if let Some((_, id)) = self.queue.get_mut(self.numbered) {
            *id = Some(packet);
            self.numbered += 1;
        }
        None
    }

    /// The broker has settled this packet.
    pub(super) fn settled(&mut self, packet: u16) -> Option<Outgoing> {
        // Brokers answer in order, so it is the first one but for brokers that do not.
        let place = self.queue.iter().take(self.numbered).position(|(_, id)| *id == Some(packet))?;
        self.remove(place)
    }

    /// Takes the oldest message out.
    pub(super) fn give_up_first(&mut self) -> Option<Outgoing> {
        self.remove(0)
    }

    /// The connection is gone: everything must be published again, in the same order.
    pub(super) fn disconnected(&mut self) {
        self.handed_over = 0;
        self.numbered = 0;
        for (_, packet) in &mut self.queue {
            *packet = None;
        }
    }

    fn remove(&mut self, place: usize) -> Option<Outgoing> {
        let (message, packet) = self.queue.remove(place)?;
        self.handed_over = self.handed_over.saturating_sub(1);
        if packet.is_some() {
            self.numbered = self.numbered.saturating_sub(1);
        }
        Some(message)
    }
}

/// The task and what it works with.
pub(super) struct Publisher {
    pub dial: Dial,
    pub qos: Qos,
    pub retain: bool,
    pub messages: mpsc::Receiver<Outgoing>,
    pub settled: watch::Sender<Settled>,
    pub standing: watch::Sender<Standing>,
    /// The largest packet that the broker takes, 0 as long as it has not said.
    pub largest_packet: watch::Sender<u32>,
    pub refusals: Arc<Refusals>,
}

/// How one connection ended.
enum Ended {
    Closed,
    Broken(Broken),
}

impl Publisher {
    /// Runs until the sink is gone and everything is settled, or the goodbye fails.
    pub(super) async fn run(mut self) {
        let mut flight = InFlight::default();
        let (mut attempt, mut barren) = (0u32, 0u32);
        loop {
            let began = Instant::now();
            let before = *self.settled.borrow();
            let (ended, sent) = self.session(&mut flight, barren >= SUSPICIOUS).await;
            flight.disconnected();
            let broken = match ended {
                Ended::Closed => return,
                Ended::Broken(broken) => broken,
            };
            if *self.settled.borrow() != before {
                barren = 0;
            } else if sent {
                barren = barren.saturating_add(1);
            }
            if barren >= POISON {
                barren = 0;
                if let Some(poison) = flight.give_up_first() {
                    let reason =
                        format!("the connection broke each of {POISON} times it was published, at last with: {}", broken.cause);
                    self.settle(&poison, Some(("undeliverable", reason)));
                }
            }
            attempt = if began.elapsed() > GOOD_CONNECTION { 1 } else { attempt.saturating_add(1) };
            let wait = pause(attempt, fastrand::f64());
            warn!(broker = %self.dial.host, cause = %broken.cause, attempt, pause = ?wait, unconfirmed = flight.len(), "mqtt connection lost; connecting again");
            self.standing.send_replace(Standing::Down { attempt, cause: broken.cause, refused: broken.refused });
            sleep(wait).await;
            if self.messages.is_closed() && self.messages.is_empty() && flight.len() == 0 {
                return;
            }
        }
    }

    /// One connection; says whether anything was published on it.
    async fn session(&mut self, flight: &mut InFlight, one_by_one: bool) -> (Ended, bool) {
        let (client, mut link) = client::connect(&self.dial);
        let mut most = usize::from(self.dial.in_flight);
        let (mut connected, mut sent, mut said_goodbye, mut open) = (false, false, false, true);
        let mut keep_alive = self.dial.keep_alive;
        loop {
            let allowed = if one_by_one { 1 } else { most };
            if connected {
                sent |= self.hand_over(&client, flight, allowed);
                if !open && flight.len() == 0 && !said_goodbye {
                    said_goodbye = client.disconnect();
                }
            } else if !open && flight.len() == 0 {
                return (Ended::Closed, sent);
            }
            let event = {
                // Never dropped half-way but to give the connection up: a packet may be half written.
                let mut poll = pin!(link.poll());
                let mut stuck = pin!(sleep(keep_alive * 2 + STUCK));
                loop {
                    tokio::select! {
                        event = &mut poll => break event,
                        () = &mut stuck => break Err(Broken { cause: "the connection is stuck".to_owned(), refused: false }),
                        message = self.messages.recv(), if open && flight.len() < most => {
                            match message {
                                Some(message) => flight.push(message),
                                None => open = false,
                            }
                            if connected {
                                sent |= self.hand_over(&client, flight, allowed);
                                if !open && flight.len() == 0 && !said_goodbye {
                                    said_goodbye = client.disconnect();
                                }
                            } else if !open && flight.len() == 0 {
                                return (Ended::Closed, sent);
                            }
                        }
                    }
                }
            };
            match event {
                Ok(Event::Disconnected) => return (Ended::Closed, sent),
                Err(_) if said_goodbye => return (Ended::Closed, sent),
                Err(broken) => return (Ended::Broken(broken), sent),
                Ok(Event::Connected(broker)) => {
                    connected = true;
                    most = most.min(broker.receive_maximum.map_or(most, |most| usize::from(most.max(1))));
                    keep_alive = broker.keep_alive.unwrap_or(keep_alive);
                    self.largest_packet.send_replace(broker.largest_packet.unwrap_or(0));
                    info!(broker = %self.dial.host, client_id = %self.dial.client_id, again = flight.len(), "mqtt connected");
                    self.standing.send_replace(Standing::Up);
                }
                Ok(Event::Published(packet)) => {
                    if let Some(message) = flight.published(packet) {
                        self.settle(&message, None);
                    }
                }
                Ok(Event::Acknowledged(packet, refusal)) => {
                    if let Some(message) = flight.settled(packet) {
                        self.settle(
                            &message,
                            refusal.map(|reason| {
                                ("refused", format!("the broker refused the message on `{}`: {reason}", message.topic))
                            }),
                        );
                    }
                }
                Ok(_) => {}
            }
        }
    }

    fn hand_over(&self, client: &Client, flight: &mut InFlight, allowed: usize) -> bool {
        let mut any = false;
        while flight.outstanding() < allowed
            && let Some(message) = flight.next()
            && client.publish(&message.topic, &message.payload, self.qos, self.retain)
        {
            flight.handed_over();
            any = true;
        }
        any
    }

    fn settle(&self, message: &Outgoing, refusal: Option<(&'static str, String)>) {
        if let Some((code, reason)) = refusal {
            for rejected in Rejected::rows(&message.batch, [message.row], code, &reason) {
                self.refusals.push(rejected);
            }
        }
        let bytes = message.bytes();
        self.settled.send_modify(|settled| {
            settled.messages += 1;
            settled.bytes += bytes;
        });
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, Int32Array};

    use super::*;

    fn flight(count: usize) -> InFlight {
        let column: ArrayRef = Arc::new(Int32Array::from(vec![0; count.max(1)]));
        let batch = Arc::new(RecordBatch::try_from_iter([("n", column)]).unwrap());
        let mut flight = InFlight::default();
        for row in 0..count {
            flight.push(Outgoing { topic: format!("t/{row}"), payload: vec![], batch: Arc::clone(&batch), row });
        }
        flight
    }

    fn hand_over(flight: &mut InFlight, count: usize) {
        for _ in 0..count {
            assert!(flight.next().is_some());
            flight.handed_over();
        }
    }

    fn row(message: Option<Outgoing>) -> Option<usize> {
        message.map(|message| message.row)
    }

    #[test]
    fn messages_are_settled_by_their_packet_id() {
        let mut flight = flight(3);
        hand_over(&mut flight, 3);
        assert!(flight.next().is_none());
        for packet in [5, 6, 7] {
            assert!(flight.published(packet).is_none());
        }
        assert_eq!(row(flight.settled(5)), Some(0));
        assert_eq!(row(flight.settled(5)), None);
        assert_eq!(row(flight.settled(7)), Some(2));
        assert_eq!(row(flight.settled(6)), Some(1));
        assert_eq!((flight.len(), flight.outstanding()), (0, 0));
    }

    #[test]
    fn what_was_not_settled_is_published_again_in_order() {
        let mut flight = flight(3);
        hand_over(&mut flight, 2);
        flight.published(1);
        flight.published(2);
        assert_eq!(row(flight.settled(1)), Some(0));
        flight.disconnected();
        assert_eq!(flight.next().map(|message| message.row), Some(1));
        hand_over(&mut flight, 2);
        assert_eq!(row(flight.settled(2)), None, "a packet id of the old connection means nothing");
        flight.published(1);
        flight.published(2);
        assert_eq!(row(flight.settled(2)), Some(2));
        assert_eq!(row(flight.settled(1)), Some(1));
    }

    #[test]
    fn at_qos_0_a_message_is_settled_when_it_went_out() {
        let mut flight = flight(2);
        hand_over(&mut flight, 2);
        assert_eq!(row(flight.published(0)), Some(0));
        assert_eq!(row(flight.published(0)), Some(1));
        assert_eq!(flight.outstanding(), 0);
    }

    #[test]
    fn giving_one_up_leaves_the_others() {
        let mut flight = flight(2);
        hand_over(&mut flight, 1);
        flight.disconnected();
        assert_eq!(row(flight.give_up_first()), Some(0));
        assert_eq!(flight.next().map(|message| message.row), Some(1));
    }
}
