//! A publisher that speaks AMQP by hand, for messages that no library sends: text that is not UTF-8.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Properties as they are written, in the bytes given; those that are `None` are left out.
#[derive(Debug, Clone, Default)]
pub struct Properties {
    /// Headers with text values.
    pub headers: Vec<(Vec<u8>, Vec<u8>)>,
    /// How many lists in lists there are in the header `nested`; 0: there is no such header.
    pub nested: usize,
    pub correlation_id: Option<Vec<u8>>,
    pub reply_to: Option<Vec<u8>>,
    pub message_id: Option<Vec<u8>>,
    /// The property `type`.
    pub kind: Option<Vec<u8>>,
}

impl Properties {
    /// Flags and values, in the order of the specification; every message is persistent.
    fn encode(&self) -> Vec<u8> {
        const DELIVERY_MODE: u16 = 1 << 12;
        let (mut flags, mut values) = (DELIVERY_MODE, Vec::new());
        let mut table = Vec::new();
        for (key, value) in &self.headers {
            short(&mut table, key);
            table.push(b'S');
            long(&mut table, value);
        }
        if self.nested > 0 {
            short(&mut table, b"nested");
            // The length of a list is that of all lists in it: 5 bytes each.
            for inner in (0..self.nested).rev() {
                table.push(b'A');
                table.extend((inner as u32 * 5).to_be_bytes());
            }
        }
        if !table.is_empty() {
            flags |= 1 << 13;
            long(&mut values, &table);
        }
        values.push(2);
        let short_strings = [
            (1 << 10, &self.correlation_id),
            (1 << 9, &self.reply_to),
            (1 << 7, &self.message_id),
            (1 << 5, &self.kind),
        ];
        for (flag, text) in short_strings {
            if let Some(text) = text {
                flags |= flag;
                short(&mut values, text);
            }
        }
        [&flags.to_be_bytes()[..], &values].concat()
    }
}

/// One channel that confirms.
pub struct RawPublisher {
    stream: TcpStream,
}

type Result<T> = std::io::Result<T>;

const METHOD: u8 = 1;
const FRAME_END: u8 = 0xCE;

impl RawPublisher {
    /// Connects as `guest` to a virtual host of the broker at `address`, `host:port`.
    pub async fn connect(address: &str, vhost: &str) -> Result<Self> {
        let mut publisher = Self { stream: TcpStream::connect(address).await? };
        publisher.stream.write_all(b"AMQP\x00\x00\x09\x01").await?;
        publisher.await_method(&[(10, 10)]).await?;
        let mut start_ok = vec![0; 4]; // no client properties
        short(&mut start_ok, b"PLAIN");
        long(&mut start_ok, b"\0guest\0guest");
        short(&mut start_ok, b"en_US");
        publisher.method(0, (10, 11), &start_ok).await?;
        let (_, tune) = publisher.await_method(&[(10, 30)]).await?;
        // Channels and frames as the broker offers them, and no heartbeats.
        let tune_ok = [&tune[..6], &[0, 0]].concat();
        publisher.method(0, (10, 31), &tune_ok).await?;
        let mut open = Vec::new();
        short(&mut open, vhost.as_bytes());
        open.extend([0, 0]);
        publisher.method(0, (10, 40), &open).await?;
        publisher.await_method(&[(10, 41)]).await?;
        publisher.method(1, (20, 10), &[0]).await?;
        publisher.await_method(&[(20, 11)]).await?;
        publisher.method(1, (85, 10), &[0]).await?;
        publisher.await_method(&[(85, 11)]).await?;
        Ok(publisher)
    }

    /// Publishes to a queue; `true` once the broker has confirmed it, `false` if it refused the message.
    pub async fn publish(
        &mut self,
        queue: &str,
        properties: &Properties,
        body: &[u8],
    ) -> Result<bool> {
        self.publish_to("", queue.as_bytes(), properties, body).await
    }

    /// The same to an exchange.
    pub async fn publish_to(
        &mut self,
        exchange: &str,
        routing_key: &[u8],
        properties: &Properties,
        body: &[u8],
    ) -> Result<bool> {
        let mut publish = vec![0, 0]; // reserved
        short(&mut publish, exchange.as_bytes());
        short(&mut publish, routing_key);
        publish.push(0);
        self.method(1, (60, 40), &publish).await?;
        let mut header = vec![0, 60, 0, 0];
        header.extend((body.len() as u64).to_be_bytes());
        header.extend(properties.encode());
        self.frame(2, 1, &header).await?;
        self.frame(3, 1, body).await?;
        let (method, _) = self.await_method(&[(60, 80), (60, 120)]).await?;
        Ok(method == (60, 80))
    }

    async fn method(&mut self, channel: u16, (class, id): (u16, u16), rest: &[u8]) -> Result<()> {
        let payload = [&class.to_be_bytes()[..], &id.to_be_bytes(), rest].concat();
        self.frame(METHOD, channel, &payload).await
    }

    async fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) -> Result<()> {
        let mut frame = vec![kind];
        frame.extend(channel.to_be_bytes());
        frame.extend((payload.len() as u32).to_be_bytes());
        frame.extend(payload);
        frame.push(FRAME_END);
        self.stream.write_all(&frame).await
    }

    /// Reads until one of these methods arrives; yields which, and its arguments.
    async fn await_method(&mut self, wanted: &[(u16, u16)]) -> Result<((u16, u16), Vec<u8>)> {
        loop {
            let mut head = [0; 7];
            self.stream.read_exact(&mut head).await?;
            let length = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
            let mut payload = vec![0; length + 1];
            self.stream.read_exact(&mut payload).await?;
            if head[0] != METHOD {
                continue; // a heartbeat
            }
            let rest = payload.split_off(4);
            let class = u16::from_be_bytes([payload[0], payload[1]]);
            let method = (class, u16::from_be_bytes([payload[2], payload[3]]));
            if wanted.contains(&method) {
                return Ok((method, rest));
            }
            let closed = matches!(method, (10, 50) | (20, 40));
            if closed {
                let reason = String::from_utf8_lossy(&rest).into_owned();
                return Err(std::io::Error::other(reason));
            }
        }
    }
}

fn short(to: &mut Vec<u8>, text: &[u8]) {
    to.push(text.len() as u8);
    to.extend(text);
}

fn long(to: &mut Vec<u8>, text: &[u8]) {
    to.extend((text.len() as u32).to_be_bytes());
    to.extend(text);
}
