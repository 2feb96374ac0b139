//! Amounts of memory as people write them.

use std::str::FromStr;

/// Value of `--ram`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ram {
    /// Bytes.
    Bytes(u64),
    /// A share of the machine's memory, above 0, at most 1.
    Share(f64),
}

impl FromStr for Ram {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "write it as 300M, 2G or 50%".to_string();
        let text = text.trim();
        if let Some(percent) = text.strip_suffix('%') {
            let percent: f64 = percent.trim().parse().map_err(|_| wrong())?;
            return if percent > 0.0 && percent <= 100.0 {
                Ok(Ram::Share(percent / 100.0))
            } else {
                Err("a share is above 0% and at most 100%".into())
            };
        }
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit: u64 = match text[digits.len()..].to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kb" | "kib" => 1 << 10,
            "m" | "mb" | "mib" => 1 << 20,
            "g" | "gb" | "gib" => 1 << 30,
            "t" | "tb" | "tib" => 1 << 40,
            _ => return Err(wrong()),
        };
        let number: f64 = digits.trim().parse().map_err(|_| wrong())?;
        let bytes = number * unit as f64;
        if !(1.0..9e18).contains(&bytes) {
            return Err(wrong());
        }
        Ok(Ram::Bytes(bytes as u64))
    }
}

/// Bytes as people read them.
pub(crate) fn bytes(n: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ if value < 10.0 => format!("{value:.2} {}", units[unit]),
        _ if value < 100.0 => format!("{value:.1} {}", units[unit]),
        _ => format!("{value:.0} {}", units[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_parse() {
        let good = [
            ("300M", Ram::Bytes(300 << 20)),
            ("2G", Ram::Bytes(2 << 30)),
            ("1.5g", Ram::Bytes(3 << 29)),
            ("4096", Ram::Bytes(4096)),
            ("64 MiB", Ram::Bytes(64 << 20)),
            ("50%", Ram::Share(0.5)),
            (" 100 % ", Ram::Share(1.0)),
        ];
        for (text, ram) in good {
            assert_eq!(text.parse::<Ram>(), Ok(ram), "{text}");
        }
        for text in ["", "M", "-1G", "0", "0%", "101%", "nan%", "nan", "inf", "1e30G", "2X", "1 2M", "５M"] {
            assert!(text.parse::<Ram>().is_err(), "{text}");
        }
    }

    #[test]
    fn amounts_print() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(300 << 20), "300 MiB");
        assert_eq!(bytes(3 << 29), "1.50 GiB");
    }
}
