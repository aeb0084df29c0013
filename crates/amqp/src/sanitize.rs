//! Messages that lapin cannot parse, made readable before lapin sees them.
//!
//! AMQP's short strings (correlation id, message id, type, the name of a header) are bytes, and a broker carries
//! whatever bytes a producer wrote. lapin insists on UTF-8, and recurses into nested headers: one delivery that it
//! cannot parse ends the connection, one that is nested deeply enough ends the process, and the broker hands the same
//! message to the next worker. So every connection reads through [`Sanitized`], which looks at the frames between the
//! socket and lapin. Frames that lapin can parse pass unchanged. In others, bytes that are not UTF-8 are written as
//! `\xff`, and the header [`UNPARSABLE`] says what was wrong ([`rewrite`]).

mod frame;
mod runtime;

use std::io::Result;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_io::{AsyncRead, AsyncWrite};

pub use crate::sanitize::frame::rewrite;
pub(super) use crate::sanitize::runtime::{Tcp, runtime};

/// The header that a message gets if its properties could not be parsed: what was wrong with them.
pub const UNPARSABLE: &str = "angler-unparsable";

/// The largest frame that is looked at. Brokers send up to their `frame_max`, 128 KiB unless configured.
const LARGEST: usize = 1 << 20;
/// Bytes that are read at once.
const CHUNK: usize = 64 << 10;
/// Kind, channel and size of a frame, in front of its payload.
const HEAD: usize = 7;
/// The byte behind each payload.
const END: u8 = 0xce;

/// A stream from a broker whose frames lapin can parse.
pub struct Sanitized<S> {
    inner: S,
    chunk: Box<[u8]>,
    frames: Frames,
}

impl<S> Sanitized<S> {
    /// Wraps a connection from which nothing has been read.
    pub fn new(inner: S) -> Self {
        Self { inner, chunk: vec![0; CHUNK].into(), frames: Frames::default() }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Sanitized<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<Result<usize>> {
        let Self { inner, chunk, frames } = &mut *self;
        loop {
            let read = frames.read(buffer);
            if read > 0 || buffer.is_empty() {
                return Poll::Ready(Ok(read));
            }
            match ready!(Pin::new(&mut *inner).poll_read(context, chunk))? {
                0 if frames.is_empty() => return Poll::Ready(Ok(0)),
                0 => frames.end(),
                count => frames.push(&chunk[..count]),
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Sanitized<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.inner).poll_close(context)
    }
}

/// Cuts a broker's bytes into frames. Only frames that can need a rewrite are held until they are complete.
#[derive(Default)]
pub struct Frames {
    /// The part of a frame that has arrived.
    partial: Vec<u8>,
    /// Bytes until the next frame begins, which pass as they come.
    passing: usize,
    /// What came is not AMQP: all of it passes.
    is_foreign: bool,
    output: Vec<u8>,
    /// Bytes of `output` that were read.
    read: usize,
}

impl Frames {
    /// Takes bytes as the broker sent them, cut anywhere.
    pub fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.is_foreign {
                self.output.extend_from_slice(bytes);
                return;
            }
            if self.passing > 0 {
                let (now, later) = bytes.split_at(self.passing.min(bytes.len()));
                self.output.extend_from_slice(now);
                self.passing -= now.len();
                bytes = later;
                continue;
            }
            let missing = self.wanted() - self.partial.len();
            let (now, later) = bytes.split_at(missing.min(bytes.len()));
            self.partial.extend_from_slice(now);
            bytes = later;
            self.complete();
        }
    }

    /// How many bytes of the current frame have to be there before it can be decided on.
    fn wanted(&self) -> usize {
        match self.payload() {
            Some(payload) => HEAD + payload + 1,
            None => HEAD,
        }
    }

    /// The size of the current frame's payload, once its head is there.
    fn payload(&self) -> Option<usize> {
        let size = self.partial.get(3..HEAD)?;
        Some(u32::from_be_bytes(size.try_into().ok()?) as usize)
    }

    /// Passes on a frame that is complete, or that need not be.
    fn complete(&mut self) {
        let Some(payload) = self.payload() else { return };
        let is_whole = self.partial.len() == HEAD + payload + 1;
        if !is_whole && frame::may_need_rewrite(self.partial[0]) && payload <= LARGEST {
            return;
        }
        if is_whole && self.partial[HEAD + payload] != END {
            return self.end();
        }
        let rewritten = match is_whole {
            true => rewrite(self.partial[0], &self.partial[HEAD..HEAD + payload]),
            false => None,
        };
        match rewritten {
            Some(new) => {
                self.output.extend_from_slice(&self.partial[..3]);
                // A rewrite is no longer than a frame.
                self.output.extend_from_slice(&(new.len() as u32).to_be_bytes());
                self.output.extend_from_slice(&new);
                self.output.push(END);
            }
            None => self.output.extend_from_slice(&self.partial),
        }
        self.passing = HEAD + payload + 1 - self.partial.len();
        self.partial.clear();
    }

    /// Nothing that follows is a frame: all of it passes.
    fn end(&mut self) {
        self.is_foreign = true;
        self.output.append(&mut self.partial);
    }

    fn is_empty(&self) -> bool {
        self.partial.is_empty() && self.read == self.output.len()
    }

    /// Reads what may be passed on; 0 if that is nothing.
    pub fn read(&mut self, buffer: &mut [u8]) -> usize {
        let ready = &self.output[self.read..];
        let count = ready.len().min(buffer.len());
        buffer[..count].copy_from_slice(&ready[..count]);
        self.read += count;
        if self.read == self.output.len() {
            self.output.clear();
            self.read = 0;
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![kind, 0, 1];
        frame.extend((payload.len() as u32).to_be_bytes());
        frame.extend(payload);
        frame.push(END);
        frame
    }

    /// A content header with a correlation id.
    fn header(correlation_id: &[u8]) -> Vec<u8> {
        let mut payload = vec![0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0x04, 0];
        payload.push(correlation_id.len() as u8);
        payload.extend(correlation_id);
        frame(2, &payload)
    }

    /// What comes out if `input` arrives in pieces of `size` and is read by `size`.
    fn through(input: &[u8], size: usize) -> Vec<u8> {
        let (mut frames, mut output) = (Frames::default(), Vec::new());
        let mut buffer = vec![0; size];
        for piece in input.chunks(size) {
            frames.push(piece);
            while let count @ 1.. = frames.read(&mut buffer) {
                output.extend_from_slice(&buffer[..count]);
            }
        }
        assert!(frames.is_empty());
        output
    }

    #[test]
    fn what_can_be_parsed_passes_byte_by_byte_however_it_is_cut() {
        let (body, large) = (vec![7; 300], vec![1; LARGEST + 1]);
        let stream = [
            frame(1, b"\0\x0a\0\x0ano start"),
            header("möglich".as_bytes()),
            frame(3, &body),
            frame(8, b""),
            frame(2, &large),
            header(b"plain"),
        ]
        .concat();
        for size in [1, 2, 7, 8, 9, 100, 4096, stream.len()] {
            assert!(through(&stream, size) == stream, "in pieces of {size}");
        }
    }

    #[test]
    fn a_frame_that_is_rewritten_leaves_its_neighbours_alone() {
        let good = [frame(3, b"before"), header(b"good")].concat();
        let stream = [&good[..], &header(b"a\xffb"), &good].concat();
        let output = through(&stream, stream.len());
        for size in [1, 3, 64] {
            assert!(through(&stream, size) == output, "in pieces of {size}");
        }
        assert!(output.starts_with(&good) && output.ends_with(&good));
        let text = String::from_utf8_lossy(&output);
        assert!(text.contains("a\\xffb") && text.contains(UNPARSABLE), "{text}");
    }

    #[test]
    fn what_is_not_amqp_passes() {
        for stream in [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], b"AMQP\0\0\x09\x01", b"\x02"] {
            let mut frames = Frames::default();
            frames.push(stream);
            frames.end();
            let mut buffer = [0; 100];
            let count = frames.read(&mut buffer);
            assert_eq!(&buffer[..count], stream);
        }
        let broken = [&[1, 0, 0, 0, 0, 0, 1, b'x', b'y'][..], &header(b"\xff")].concat();
        assert!(through(&broken, 4) == broken, "no frame ends where the first one should");
    }
}
