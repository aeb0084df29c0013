//! `docs/operations.md` and `deploy/README.md` against what they tell of.

use std::collections::BTreeSet;
use std::path::Path;

use crate::support::repository;
use crate::text;

const GUIDE: &str = "docs/operations.md";

#[test]
fn the_guide_has_a_section_for_each_alert_and_for_no_other() {
    let rules = text("deploy/prometheus/alerts.yml");
    let alerts: BTreeSet<&str> =
        rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    let guide = text(GUIDE);
    let sections: BTreeSet<&str> = guide
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .filter(|s| s.starts_with("Angler"))
        .collect();
    assert_eq!(sections, alerts);
}

#[test]
fn every_setting_that_the_guides_name_exists() {
    let defaults: toml::Table = toml::from_str(angler::config::DEFAULTS).unwrap();
    let mut named = 0;
    for page in [GUIDE, "deploy/README.md", "docs/wire-format.md"] {
        let page = text(page);
        for code in page.split('`').skip(1).step_by(2) {
            let code = code.strip_prefix("settings.").unwrap_or(code);
            let Some((section, key)) = code.split_once('.') else { continue };
            let Some(table) = defaults.get(section).and_then(toml::Value::as_table) else {
                continue;
            };
            let key = key.split(['=', ' ']).next().unwrap();
            assert!(table.contains_key(key), "{code} is no setting");
            named += 1;
        }
    }
    assert!(named > 20, "only {named} settings were found");
}

#[test]
fn every_file_that_the_guides_link_to_exists() {
    let mut followed = 0;
    for page in [GUIDE, "deploy/README.md", "docs/wire-format.md"] {
        let folder = repository(page).parent().map(Path::to_path_buf).unwrap();
        for link in
            text(page).split("](").skip(1).map(|rest| rest.split(')').next().unwrap().to_owned())
        {
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            if file.starts_with("http") {
                continue;
            }
            let path = if file.is_empty() { repository(page) } else { folder.join(file) };
            assert!(path.exists(), "{page}: {link}");
            if !anchor.is_empty() {
                let heading = |line: &str| {
                    let line = line.trim_start_matches('#').trim().to_lowercase();
                    line.replace(|c: char| !c.is_alphanumeric() && c != ' ', "").replace(' ', "-")
                };
                let target = std::fs::read_to_string(&path).unwrap();
                let mut headings = target.lines().filter(|line| line.starts_with('#')).map(heading);
                assert!(headings.any(|found| found == anchor), "{page}: {link}");
            }
            followed += 1;
        }
    }
    assert!(followed > 15, "only {followed} links were found");
}
