use super::*;

const LIMITS: PixelLimits = PixelLimits { max_pixels: 1_000_000 };
const SHORT: u16 = 3;
const LONG: u16 = 4;
const LONG8: u16 = 16;

/// An entry of a directory: tag, type, count and value.
type Entry = (u16, u16, u32, u32);

/// A file of one directory at its begin, and the same as BigTIFF; of either byte order.
fn file(little_endian: bool, big: bool, entries: &[Entry], tail: &[u8]) -> Vec<u8> {
    let number = |n: u64, size: usize| {
        let bytes = n.to_le_bytes();
        let mut bytes = bytes[..size].to_vec();
        if !little_endian {
            bytes.reverse();
        }
        bytes
    };
    let mut bytes = if little_endian { b"II".to_vec() } else { b"MM".to_vec() };
    let (offset, count) = if big { (8, 8) } else { (4, 2) };
    if big {
        bytes.extend([number(43, 2), number(8, 2), number(0, 2), number(16, 8)].concat());
    } else {
        bytes.extend([number(42, 2), number(8, 4)].concat());
    }
    bytes.extend(number(entries.len() as u64, count));
    for &(tag, kind, count, value) in entries {
        bytes.extend([number(tag.into(), 2), number(kind.into(), 2)].concat());
        bytes.extend(number(count.into(), offset));
        let size = match kind {
            SHORT if count == 1 => 2,
            LONG8 => 8,
            _ => 4,
        };
        let mut value = number(value.into(), size);
        value.resize(offset, 0);
        bytes.extend(value);
    }
    bytes.extend(number(0, offset));
    bytes.extend(tail);
    bytes
}

fn code(bytes: &[u8]) -> Option<ImageErrorCode> {
    decode(bytes, LIMITS).err().map(|error| error.code)
}

fn verdict(entries: &[Entry]) -> Option<ImageErrorCode> {
    let [little, big] = [true, false].map(|little| code(&file(little, false, entries, b"")));
    assert_eq!(little, big);
    little
}

/// Grey pixels of 2 × 2, right behind the directory of 9 entries.
fn grey(more: Entry) -> Vec<Entry> {
    const BEHIND: u32 = 8 + 2 + 9 * 12 + 4;
    let size = [(256, SHORT, 1, 2), (257, LONG, 1, 2), (258, SHORT, 1, 8), (259, SHORT, 1, 1)];
    let pixels =
        [(262, SHORT, 1, 1), (273, LONG, 1, BEHIND), (278, SHORT, 1, 2), (279, LONG, 1, 4)];
    [size.as_slice(), &pixels, &[more]].concat()
}

#[test]
fn both_byte_orders_and_bigtiff_are_read() {
    let pixels = [0, 50, 100, 250];
    for little_endian in [true, false] {
        let entries = grey((305, SHORT, 1, 0));
        let image = decode(&file(little_endian, false, &entries, &pixels), LIMITS).unwrap().image;
        assert_eq!(image.as_raw().chunks(3).map(|pixel| pixel[0]).collect::<Vec<_>>(), pixels);
        let mut entries = grey((305, LONG8, 1, 0));
        entries[5].3 = 16 + 8 + 9 * 20 + 8;
        let image = decode(&file(little_endian, true, &entries, &pixels), LIMITS).unwrap().image;
        assert_eq!(image.as_raw().chunks(3).map(|pixel| pixel[0]).collect::<Vec<_>>(), pixels);
    }
}

#[test]
fn a_cut_file_is_corrupt() {
    let whole = file(true, false, &grey((305, SHORT, 1, 0)), &[0; 4]);
    for end in 0..whole.len() {
        assert_eq!(code(&whole[..end]), Some(ImageErrorCode::CorruptImage), "{end}");
    }
}

#[test]
fn claims_are_bounded() {
    let with = |more: Entry| verdict(&grey(more));
    let too_large = Some(ImageErrorCode::TooLarge);
    let size = |width, height| [(256, LONG, 1, width), (257, LONG, 1, height)];
    assert_eq!(verdict(&size(100_000, 100)), too_large);
    assert_eq!(
        verdict(&[size(9, 9).as_slice(), &[(322, LONG, 1, u32::MAX), (323, LONG, 1, 9)]].concat()),
        too_large
    );
    assert_eq!(
        verdict(
            &[size(9, 9).as_slice(), &[(322, LONG, 1, 60_000), (323, LONG, 1, 60_000)]].concat()
        ),
        too_large
    );
    assert_eq!(with((277, LONG, 1, u32::MAX)), too_large);
    let mut entries = grey((305, SHORT, 1, 0));
    entries[5].2 = (1 << 20) + 1;
    assert_eq!(verdict(&entries), too_large);
}

#[test]
fn damage_is_seen() {
    let corrupt = Some(ImageErrorCode::CorruptImage);
    assert_eq!(verdict(&[]), corrupt);
    assert_eq!(verdict(&[(256, LONG, 1, 0), (257, LONG, 1, 5)]), corrupt);
    assert_eq!(verdict(&[(256, 5, 1, 8), (257, LONG, 1, 5)]), corrupt); // a fraction
    assert_eq!(verdict(&[(256, LONG, 2, u32::MAX), (257, LONG, 1, 5)]), corrupt);
    assert_eq!(verdict(&[(256, LONG, 1, 9), (257, LONG, 1, 9)]), corrupt); // no pixels
    let empty_tiles = [(256, LONG, 1, 9), (257, LONG, 1, 9), (322, LONG, 1, 0), (323, LONG, 1, 0)];
    assert_eq!(verdict(&empty_tiles), corrupt);
}

#[test]
fn kinds_that_are_not_read_are_named() {
    for (tag, value, name) in [
        (259, 6, "old-style JPEG"),
        (259, 33_003, "JPEG 2000"),
        (259, 34_887, "LERC"),
        (259, 12_345, "12345"),
        (262, 32_803, "raw photo"),
        (339, 5, "complex"),
    ] {
        let mut entries = grey((339, SHORT, 1, 1));
        entries.iter_mut().filter(|entry| entry.0 == tag).for_each(|entry| entry.3 = value);
        let error = decode(&file(true, false, &entries, &[0; 4]), LIMITS).err().unwrap();
        assert_eq!(error.code, ImageErrorCode::UnsupportedFormat, "{}", error.message);
        assert!(error.message.contains(name), "{}", error.message);
    }
}
