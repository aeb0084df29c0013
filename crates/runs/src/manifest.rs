//! Lists of images, as people have them: text, CSV, JSON lines or Parquet.

mod columnar;

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde::Deserialize;

use angler_wire::error::Reason;
use angler_wire::job::ImageRef;

use super::spool::Spool;

/// How a list is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A URI a line; empty lines and those that begin with # are left out.
    Text,
    /// With a header, a column `uri` and perhaps one `id`; other columns are left out.
    Csv,
    /// A URI or an object with `uri` and perhaps `id` a line, as `angler classify` writes it.
    Jsonl,
    /// With a column `uri` of strings and perhaps one `id`; other columns are left out.
    Parquet,
}

impl Format {
    /// By a file's ending.
    pub fn of(name: &str) -> Option<Self> {
        match Path::new(name).extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "txt" | "text" | "list" => Some(Self::Text),
            "csv" => Some(Self::Csv),
            "jsonl" | "ndjson" => Some(Self::Jsonl),
            "parquet" | "pq" => Some(Self::Parquet),
            _ => None,
        }
    }
}

/// What is wrong with a list.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// A line is no image.
    #[error("{place}, line {line}: {reason}")]
    Line {
        /// The list.
        place: String,
        /// From 1.
        line: u64,
        /// What is wrong.
        #[source]
        reason: Reason,
    },
    /// A row is no image.
    #[error("{place}, row {row}: {reason}")]
    Row {
        /// The list.
        place: String,
        /// From 1.
        row: u64,
        /// What is wrong.
        #[source]
        reason: Reason,
    },
    /// It is no Parquet file, or none with images.
    #[error("{place} {reason}")]
    Parquet {
        /// The list.
        place: String,
        /// What is wrong.
        #[source]
        reason: Reason,
    },
    /// It has no column of URIs.
    #[error("{0} has no column `uri`: its first line must name the columns")]
    NoColumn(String),
    /// It cannot be read.
    #[error("{0} cannot be read")]
    Read(String, #[source] std::io::Error),
    /// The disk is full, perhaps.
    #[error("the list of images cannot be kept")]
    Spool(#[from] std::io::Error),
}

/// Appends the list's images to `spool`. `check` says what is wrong with a URI.
///
/// # Errors
/// [`ManifestError`], at the first line that is no image.
pub fn read(
    mut source: impl BufRead,
    format: Format,
    place: &str,
    spool: &mut Spool,
    check: impl Fn(&str) -> Result<(), Reason>,
) -> Result<(), ManifestError> {
    if format == Format::Parquet {
        // It is read from its end: what comes through a pipe is put into a file first.
        let mut file = tempfile::tempfile()?;
        std::io::copy(&mut source, &mut file)?;
        return columns(file, place, spool, check);
    }
    let wrong =
        |line: u64, reason: Reason| ManifestError::Line { place: place.to_owned(), line, reason };
    let mut push = |line: u64, image: ImageRef| {
        check(&image.uri).map_err(|reason| wrong(line, reason))?;
        spool.push(image).map_err(ManifestError::from)
    };
    if format == Format::Csv {
        return csv(source, place, wrong, push);
    }
    for (line, text) in lines(source).enumerate() {
        let line = line as u64 + 1;
        let text = text.map_err(|e| match e.kind() {
            std::io::ErrorKind::InvalidData => wrong(line, Reason::of(e)),
            _ => ManifestError::Read(place.to_owned(), e),
        })?;
        let text = text.trim();
        if text.is_empty() || (format == Format::Text && text.starts_with('#')) {
            continue;
        }
        let image = match format {
            Format::Jsonl => serde_json::from_str(text).map_err(|e| wrong(line, Reason::of(e)))?,
            Format::Text | Format::Csv | Format::Parquet => {
                ImageRef { uri: text.to_owned(), id: None }
            }
        };
        push(line, image)?;
    }
    Ok(())
}

/// As [`read`] does, from a file.
///
/// # Errors
/// [`ManifestError`], at the first line or row that is no image.
pub fn read_file(
    file: File,
    format: Format,
    place: &str,
    spool: &mut Spool,
    check: impl Fn(&str) -> Result<(), Reason>,
) -> Result<(), ManifestError> {
    // A named pipe is no file that can be read from its end.
    match format == Format::Parquet && file.metadata().is_ok_and(|of| of.is_file()) {
        true => columns(file, place, spool, check),
        false => read(BufReader::new(file), format, place, spool, check),
    }
}

fn columns(
    file: File,
    place: &str,
    spool: &mut Spool,
    check: impl Fn(&str) -> Result<(), Reason>,
) -> Result<(), ManifestError> {
    columnar::read(file, place, |row, image| {
        check(&image.uri).map_err(|reason| ManifestError::Row {
            place: place.to_owned(),
            row,
            reason,
        })?;
        Ok(spool.push(image)?)
    })
}

/// The longest line that is read: a row of results with an embedding has some kilobytes.
const LONGEST: u64 = 1 << 20;

/// Lines of at most [`LONGEST`] bytes.
fn lines(mut source: impl BufRead) -> impl Iterator<Item = std::io::Result<String>> {
    std::iter::from_fn(move || {
        let mut line = String::new();
        match source.by_ref().take(LONGEST).read_line(&mut line) {
            Ok(0) => None,
            Ok(read) if read as u64 == LONGEST && !line.ends_with('\n') => {
                let error = format!("a line has more than {LONGEST} bytes");
                Some(Err(std::io::Error::new(std::io::ErrorKind::InvalidData, error)))
            }
            Ok(_) => Some(Ok(line)),
            Err(error) => Some(Err(error)),
        }
    })
}

fn csv(
    source: impl BufRead,
    place: &str,
    wrong: impl Fn(u64, Reason) -> ManifestError,
    mut push: impl FnMut(u64, ImageRef) -> Result<(), ManifestError>,
) -> Result<(), ManifestError> {
    #[derive(Deserialize)]
    struct Row {
        uri: String,
        id: Option<String>,
    }
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::Headers).from_reader(source);
    let failed = |e: csv::Error| {
        let line = e.position().map_or(1, csv::Position::line);
        match e.into_kind() {
            csv::ErrorKind::Io(e) => ManifestError::Read(place.to_owned(), e),
            csv::ErrorKind::Utf8 { err, .. } => wrong(line, Reason::new("not UTF-8", err)),
            csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
                wrong(line, format!("it has {len} columns, the first line {expected_len}").into())
            }
            other => wrong(line, format!("{other:?}").into()),
        }
    };
    let headers = reader.headers().map_err(failed)?.clone();
    if !headers.iter().any(|name| name == "uri") {
        return Err(ManifestError::NoColumn(place.to_owned()));
    }
    let mut record = csv::StringRecord::new();
    while reader.read_record(&mut record).map_err(failed)? {
        let line = record.position().map_or(0, csv::Position::line);
        let Row { uri, id } =
            record.deserialize(Some(&headers)).map_err(|e| wrong(line, Reason::of(e)))?;
        push(line, ImageRef { uri, id: id.filter(|id| !id.is_empty()) })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use angler_wire::text::chain;

    use super::*;

    fn images(text: &str, format: Format) -> Result<Vec<(String, Option<String>)>, String> {
        let mut spool = Spool::new().unwrap();
        let check = |uri: &str| match uri.starts_with("s3://") {
            true => Ok(()),
            false => Err(format!("{uri:?} is not an s3:// URI").into()),
        };
        read(text.as_bytes(), format, "list", &mut spool, check).map_err(|e| chain(&e))?;
        let images = spool.finish().unwrap();
        let all =
            images.jobs_from(0, 1000).unwrap().next().transpose().unwrap().unwrap_or_default();
        Ok(all.into_iter().map(|image| (image.uri, image.id)).collect())
    }

    fn bare(uri: &str) -> (String, Option<String>) {
        (uri.to_owned(), None)
    }

    #[test]
    fn each_way_of_writing_a_list_is_read() {
        let wanted =
            vec![bare("s3://b/a.jpg"), ("s3://b/ö, 2.jpg".to_owned(), Some("sku".to_owned()))];
        let text = "# two\ns3://b/a.jpg\r\n\n  s3://b/ö, 2.jpg\n";
        let found = images(text, Format::Text).unwrap();
        assert_eq!(found, [bare("s3://b/a.jpg"), bare("s3://b/ö, 2.jpg")]);
        let csv = "id, uri ,note\n,s3://b/a.jpg,x\nsku,\"s3://b/ö, 2.jpg\",\"two\nlines\"\n";
        assert_eq!(images(csv, Format::Csv).unwrap(), wanted);
        let jsonl =
            "\"s3://b/a.jpg\"\n\n{\"uri\":\"s3://b/ö, 2.jpg\",\"id\":\"sku\",\"label\":null}";
        assert_eq!(images(jsonl, Format::Jsonl).unwrap(), wanted);
        assert_eq!(images("", Format::Text).unwrap(), []);
    }

    #[test]
    fn a_line_that_is_no_image_is_named() {
        for (text, format, words) in [
            (
                "s3://b/a\nphotos/b.jpg\n",
                Format::Text,
                "list, line 2: \"photos/b.jpg\" is not an s3",
            ),
            ("uri\ns3://b/a\n/b\n", Format::Csv, "list, line 3: \"/b\""),
            ("uri,id\ns3://b/a\n", Format::Csv, "list, line 2: it has 1 columns, the first line 2"),
            ("url\ns3://b/a\n", Format::Csv, "no column `uri`"),
            ("\"s3://b/a\"\n{\"id\":\"x\"}\n", Format::Jsonl, "list, line 2:"),
            ("{", Format::Jsonl, "list, line 1:"),
            (&"x".repeat(2 << 20), Format::Text, "list, line 1: a line has more than"),
        ] {
            let error = images(text, format).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn a_list_is_known_by_its_ending() {
        assert_eq!(Format::of("s3://b/x.CSV"), Some(Format::Csv));
        assert_eq!(Format::of("a/b.ndjson"), Some(Format::Jsonl));
        assert_eq!(Format::of("a/b.parquet"), Some(Format::Parquet));
        assert_eq!(Format::of("list.txt"), Some(Format::Text));
        assert_eq!(Format::of("s3://b/prefix/"), None);
        assert_eq!(Format::of("photo.jpg"), None);
    }
}
