//! The task that keeps a source's connection: connects, subscribes, puts what arrives into the inbox,
//! acknowledges what has become durable, and connects again. It alone talks to the client library, and it alone
//! knows which connection stands, so that no acknowledgement can cross from one connection to the next.
//!
//! *Why nothing here can lock up.* The task waits for one thing only, in one `select`: the connection, a command
//! of the source, or (when the inbox is full) room. It never waits for the inbox while something else has to be
//! sent. Commands are a `watch` value, the newest of which stands for all before it, so the source never waits for
//! the task; acknowledgements enter the library's bounded request channel by `try_send` and stay in a queue of
//! ours while it is full, and every poll makes room in it.
//!
//! *When the source is not pulled.* A full inbox means that the connection is not read. At QoS 1 that cannot last:
//! rumqttc answers pings only while it is polled, and its answer comes behind whatever the broker has written by
//! then. So the connection is left alone only until the next ping is due, then read until the answer has come,
//! over the inbox's limit if need be. What can arrive by that is bounded by the peer: MQTT 5 brokers send no more
//! than `receive_maximum` unacknowledged messages, 3.1.1 brokers no more than their own window (20 for mosquitto).
//! At QoS 0 nothing bounds the peer, and `overload` says what is given up: new messages, old ones, or (`block`)
//! the connection, which the broker closes after one and a half keep-alive intervals without a ping.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use prometheus::IntCounter;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use super::ack::{Mark, Unacknowledged};
use super::client::{self, Broken, Client, Connected, Event, Message, Token};
use super::config::{Dial, Protocol, Qos};
use super::inbox::{Arrival, Inbox, Window};
use super::source::Overload;

/// The longest pause between two attempts to connect.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A connection that stood this long was a good one: the next attempt comes soon.
const GOOD_CONNECTION: Duration = Duration::from_secs(20);
/// A poll that yields nothing for two keep-alive intervals and this long is stuck in a write to a peer that does
/// not read (MQTT 5 in rumqttc has no limit on that): the connection is given up.
const STUCK: Duration = Duration::from_secs(15);
/// How long a broker may take to close the connection after our DISCONNECT. By then it has read the last
/// acknowledgements: mosquitto reads one packet a turn, and a client that comes back at once under the same id
/// takes the session over before the rest is read, so that acknowledged messages come again.
const FAREWELL: Duration = Duration::from_secs(1);

/// What the source wants. The newest value stands for all before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Command {
    /// Everything up to here is durable.
    pub durable: Option<Mark>,
    /// Say goodbye and end.
    pub close: bool,
}

/// How the connection stands, for whoever opens the source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Standing {
    /// Not tried yet.
    #[default]
    Waiting,
    /// Connected and subscribed.
    Up,
    /// The last attempt failed; the number of attempts makes each failure a change.
    Down { attempt: u32, cause: String, refused: bool },
}

/// The task and what it works with.
pub(super) struct Subscriber {
    pub dial: Dial,
    pub filters: Vec<String>,
    pub qos: Qos,
    pub overload: Overload,
    pub inbox: Arc<Inbox>,
    pub commands: watch::Receiver<Command>,
    pub standing: watch::Sender<Standing>,
    pub dropped: IntCounter,
    /// An earlier run of this pipeline had a session, so it ought to be there.
    pub session_expected: bool,
    /// The broker has confirmed our subscription within its present session.
    pub subscribed: bool,
    /// Messages are numbered from here.
    pub sequence: u64,
}

/// How one connection ended.
enum Ended {
    Closed,
    Broken(Broken),
}

/// What is known of the connection that stands.
struct Session {
    connected: bool,
    subscribed: bool,
    closing: bool,
    /// Our DISCONNECT is in the library's channel, behind everything that was to go out before it.
    said_goodbye: bool,
    /// Our DISCONNECT has gone out; the broker closes the connection when it has read that far.
    parted: bool,
    since: Mark,
    maximum: Option<usize>,
    keep_alive: Duration,
    /// No ping is due before, and the answer to the last one has come.
    quiet_until: Option<Instant>,
    last_ping: Instant,
    /// Acknowledgements that found no room in the library's channel.
    queued: VecDeque<Token>,
    /// Acknowledgements in that channel.
    handed_over: usize,
}

impl Subscriber {
    /// Runs until told to close, or until the source is gone.
    pub(super) async fn run(mut self) {
        let mut unacknowledged = Unacknowledged::after(self.sequence);
        let mut attempt: u32 = 0;
        loop {
            let began = Instant::now();
            let ended = self.session(&mut unacknowledged).await;
            unacknowledged.disconnected();
            let broken = match ended {
                Ended::Closed => return,
                Ended::Broken(broken) => broken,
            };
            attempt = if began.elapsed() > GOOD_CONNECTION { 1 } else { attempt.saturating_add(1) };
            let pause = pause(attempt, fastrand::f64());
            warn!(broker = %self.dial.host, cause = %broken.cause, attempt, ?pause, "mqtt connection lost; connecting again");
            self.standing.send_replace(Standing::Down { attempt, cause: broken.cause, refused: broken.refused });
            let mut waited = pin!(sleep(pause));
            loop {
                tokio::select! {
                    () = &mut waited => break,
                    changed = self.commands.changed() => {
                        // A commit is of no use without a connection; the broker sends those messages again.
                        if changed.is_err() || self.commands.borrow_and_update().close {
                            return;
                        }
                    }
                }
            }
        }
    }

    /// One connection from its first byte to its last.
    async fn session(&mut self, unacknowledged: &mut Unacknowledged<Token>) -> Ended {
        let (client, mut link) = client::connect(&self.dial);
        let mut session = Session {
            connected: false,
            subscribed: false,
            closing: self.commands.borrow_and_update().close,
            said_goodbye: false,
            parted: false,
            since: Mark::default(),
            maximum: None,
            keep_alive: self.dial.keep_alive,
            quiet_until: None,
            last_ping: Instant::now(),
            queued: VecDeque::new(),
            handed_over: 0,
        };
        loop {
            if session.closing && !session.connected {
                return Ended::Closed;
            }
            session.hand_over(&client);
            if let Some(until) = self.must_pause(&session) {
                tokio::select! {
                    () = self.inbox.room() => {}
                    () = sleep_until(until) => {}
                    changed = self.commands.changed() => self.obey(changed.is_ok(), unacknowledged, &mut session),
                }
                continue;
            }
            let limit = if session.parted { FAREWELL } else { session.keep_alive * 2 + STUCK };
            let event = {
                // The poll is never dropped half-way but to give the connection up: a packet may be half written.
                let mut poll = pin!(link.poll());
                let mut stuck = pin!(sleep(limit));
                loop {
                    tokio::select! {
                        event = &mut poll => break event,
                        () = &mut stuck => break Err(Broken { cause: "the connection is stuck".to_owned(), refused: false }),
                        changed = self.commands.changed(), if !session.closing => {
                            self.obey(changed.is_ok(), unacknowledged, &mut session);
                            if session.closing && !session.connected {
                                return Ended::Closed;
                            }
                            session.hand_over(&client);
                        }
                    }
                }
            };
            match event {
                Ok(Event::Disconnected) => session.parted = true,
                Err(_) if session.closing => return Ended::Closed,
                Err(broken) => return Ended::Broken(broken),
                Ok(event) => {
                    if let Some(broken) = self.on(event, &client, unacknowledged, &mut session) {
                        return Ended::Broken(broken);
                    }
                }
            }
        }
    }

    /// Takes a new command to heart.
    fn obey(&mut self, alive: bool, unacknowledged: &mut Unacknowledged<Token>, session: &mut Session) {
        let command = *self.commands.borrow_and_update();
        if let Some(durable) = command.durable {
            session.queued.extend(unacknowledged.durable(durable));
        }
        session.closing |= command.close || !alive;
    }

    /// The source is behind, and the connection may be left alone until then.
    fn must_pause(&self, session: &Session) -> Option<Instant> {
        let sending = session.handed_over > 0 || !session.queued.is_empty();
        if !session.subscribed || session.closing || sending || !self.inbox.is_full() {
            return None;
        }
        match (self.qos, self.overload) {
            (Qos::AtMostOnce, Overload::Block) => Some(Instant::now() + LONGEST_PAUSE),
            (Qos::AtMostOnce, _) => None,
            _ => session.quiet_until.filter(|until| *until > Instant::now()),
        }
    }

    fn on(
        &mut self,
        event: Event,
        client: &Client,
        unacknowledged: &mut Unacknowledged<Token>,
        session: &mut Session,
    ) -> Option<Broken> {
        match event {
            Event::Connected(connected) => self.on_connected(&connected, client, unacknowledged, session),
            Event::Message(message) => self.on_message(message, unacknowledged, session),
            Event::Subscribed(refused) => {
                if let Some((number, reason)) = refused.first() {
                    let filter = self.filters.get(*number).map_or("?", String::as_str);
                    return Some(Broken {
                        cause: format!("the broker refused the subscription to `{filter}`: {reason}"),
                        refused: true,
                    });
                }
                self.up(session);
            }
            Event::AckSent => session.handed_over = session.handed_over.saturating_sub(1),
            Event::PingSent => {
                session.last_ping = Instant::now();
                session.quiet_until = None;
            }
            Event::PingAnswered => session.quiet_until = Some(session.last_ping + session.keep_alive),
            Event::Acknowledged(..) | Event::Published(_) | Event::Disconnected | Event::Other => {}
        }
        None
    }

    fn on_connected(
        &mut self,
        connected: &Connected,
        client: &Client,
        unacknowledged: &mut Unacknowledged<Token>,
        session: &mut Session,
    ) {
        session.since = unacknowledged.connected();
        session.connected = true;
        session.last_ping = Instant::now();
        session.keep_alive = connected.keep_alive.unwrap_or(self.dial.keep_alive);
        session.quiet_until = Some(session.last_ping + session.keep_alive);
        session.maximum = (self.dial.protocol == Protocol::V5).then_some(usize::from(self.dial.receive_maximum));
        self.inbox.reconnected(
            Window { size: unacknowledged.window(session.maximum), since: session.since },
            connected.session_present,
        );
        let again = session.since.connection > 1;
        if !connected.session_present && self.dial.session.is_some() && (again || self.session_expected) {
            warn!(
                broker = %self.dial.host,
                client_id = %self.dial.client_id,
                "the broker does not know our session any more: messages published while we were away are gone"
            );
        }
        self.session_expected = true;
        // The first connection of a process subscribes in any case: the topics may have changed since the last run.
        // A session may be there without our subscription: the link may have broken before the broker had it.
        self.subscribed &= connected.session_present;
        if self.subscribed {
            self.up(session);
        } else if !client.subscribe(&self.filters, self.qos) {
            warn!("the subscription found no room in the client's queue");
        }
    }

    fn up(&self, session: &mut Session) {
        session.subscribed = true;
        info!(broker = %self.dial.host, client_id = %self.dial.client_id, connection = session.since.connection, "mqtt connected and subscribed");
        self.standing.send_replace(Standing::Up);
    }

    fn on_message(&mut self, message: Message, unacknowledged: &mut Unacknowledged<Token>, session: &Session) {
        let token = message.token();
        // What is not acknowledged has no window either: it is all that `overload` may drop.
        if token.is_none() && self.inbox.is_full() {
            match self.overload {
                Overload::Block => {}
                Overload::DropNewest => {
                    self.dropped.inc();
                    return;
                }
                Overload::DropOldest => {
                    self.dropped.inc();
                    if !self.inbox.drop_oldest() {
                        return;
                    }
                }
            }
        }
        let arrival = Arrival {
            kept: token.is_some(),
            mark: unacknowledged.received(token),
            message,
            time: super::source::now(),
            ingest: Instant::now(),
        };
        self.inbox.put(arrival, Window { size: unacknowledged.window(session.maximum), since: session.since });
    }
}

impl Session {
    /// Puts acknowledgements into the library's channel, in order, as far as there is room; then, if that was
    /// all there will be, the goodbye.
    fn hand_over(&mut self, client: &Client) {
        while self.connected
            && let Some(token) = self.queued.front()
            && client.acknowledge(*token)
        {
            self.queued.pop_front();
            self.handed_over += 1;
        }
        if self.closing && self.connected && self.queued.is_empty() && !self.said_goodbye {
            self.said_goodbye = client.disconnect();
        }
    }
}

impl Drop for Subscriber {
    /// However the task ends, the source hears of it.
    fn drop(&mut self) {
        self.inbox.end("the mqtt connection task has ended".to_owned());
    }
}

/// How long to wait before attempt number `attempt`: doubling from a quarter of a second to the longest pause,
/// of which the second half is random, so that a thousand clients of one broker do not come back at once.
pub(super) fn pause(attempt: u32, random: f64) -> Duration {
    let full = Duration::from_millis(250).saturating_mul(1 << attempt.saturating_sub(1).min(10)).min(LONGEST_PAUSE);
    full.mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_thirty_seconds_and_are_spread() {
        assert_eq!(pause(1, 1.0), Duration::from_millis(250));
        assert_eq!(pause(2, 0.0), Duration::from_millis(250));
        assert_eq!(pause(100, 1.0), LONGEST_PAUSE);
        assert_eq!(pause(100, 0.0), LONGEST_PAUSE / 2);
    }
}
