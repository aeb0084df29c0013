//! Prometheus' text format, read for tests: families with their types, samples with their labels.

use std::collections::{BTreeMap, BTreeSet};

/// What one scrape held.
#[derive(Default)]
pub struct Exposed {
    /// Each family's type.
    pub types: BTreeMap<String, String>,
    /// Each sample by `name{a="b",c="d"}`, labels sorted.
    samples: BTreeMap<String, f64>,
    /// Each family's labels, without `le`, and their values.
    pub labels: BTreeMap<String, BTreeMap<String, BTreeSet<String>>>,
}

impl Exposed {
    /// Values with a comma or a quote in them would be read wrongly; no test has any.
    pub fn read(text: &str) -> Self {
        let mut exposed = Self::default();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                let again = exposed.types.insert(name.to_owned(), kind.to_owned());
                assert!(again.is_none(), "{name} is there twice");
                exposed.labels.insert(name.to_owned(), BTreeMap::new());
            } else if !line.starts_with('#') && !line.is_empty() {
                exposed.sample(line);
            }
        }
        exposed
    }

    fn sample(&mut self, line: &str) {
        let (series, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = match series.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}').unwrap()),
            None => (series, ""),
        };
        let mut pairs: Vec<&str> = labels.split(',').filter(|pair| !pair.is_empty()).collect();
        pairs.sort_unstable();
        let series = if pairs.is_empty() {
            name.to_owned()
        } else {
            format!("{name}{{{}}}", pairs.join(","))
        };
        assert!(self.samples.insert(series, value.parse().unwrap()).is_none(), "{line}: twice");
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .filter_map(|end| name.strip_suffix(end))
            .find(|family| self.types.get(*family).is_some_and(|kind| kind == "histogram"))
            .unwrap_or(name);
        let known = self.labels.get_mut(family).unwrap_or_else(|| panic!("{line}: without a type"));
        for (label, value) in pairs.iter().filter_map(|pair| pair.split_once('=')) {
            if label != "le" {
                let value = value.trim_matches('"').to_owned();
                known.entry(label.to_owned()).or_default().insert(value);
            }
        }
    }

    /// A sample; none if there is none.
    pub fn get(&self, series: &str) -> Option<f64> {
        self.samples.get(series).copied()
    }

    /// A sample that has to be there.
    pub fn value(&self, series: &str) -> f64 {
        self.get(series).unwrap_or_else(|| panic!("no {series} in {:#?}", self.samples))
    }
}
