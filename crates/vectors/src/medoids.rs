//! k-medoids: the few images that stand for a class of many.
//!
//! A medoid is the member of a group whose distances to the others have the smallest sum; being a
//! real image, it stays a point of the data where the mean of a class with two faces (front and
//! back, two designs) lies between them (Kaufman & Rousseeuw, "Clustering by means of medoids",
//! 1987). The distance is 1 − cosine.
//!
//! The search is the Voronoi iteration of Park & Jun, "A simple and fast algorithm for K-medoids
//! clustering" (Expert Systems with Applications 36, 2009): each image goes to its nearest medoid,
//! each group's medoid is found anew, until nothing changes. It starts from the medoid of all (as
//! PAM's BUILD does) and then takes the image farthest from those taken, over and over (Gonzalez,
//! "Clustering to minimize the maximum intercluster distance", 1985): no random numbers, so the same
//! images give the same medoids.

use ndarray::{Array2, ArrayView2};

/// Images of one class that take part; the distances among them are 64 MiB.
pub const MAX_IMAGES: usize = 4096;

/// Rounds of the iteration; it nearly always settles in fewer than ten.
const ROUNDS: usize = 20;

/// Images nearer than this are copies of each other: f32 rounds a cosine of 1 by about this much.
const SAME: f32 = 1e-6;

/// The numbers of `wanted` representative rows, ascending; all rows if there are no more than
/// that, fewer than wanted if the others are copies of those.
///
/// `rows`: [N, D], unit rows; N at most [`MAX_IMAGES`] (see [`subsample`]), as N × N distances are
/// in memory.
pub fn medoids(rows: ArrayView2<'_, f32>, wanted: usize) -> Vec<usize> {
    let count = rows.nrows();
    if count <= wanted {
        return (0..count).collect();
    }
    if wanted == 0 {
        return Vec::new();
    }
    let mut distances = rows.dot(&rows.t());
    distances.mapv_inplace(|cosine| (1.0 - cosine).max(0.0));
    distances.diag_mut().fill(0.0);
    let mut medoids = start(&distances, wanted);
    for _ in 0..ROUNDS {
        let groups = assign(&distances, &medoids);
        let next: Vec<usize> = groups.iter().map(|group| central(&distances, group)).collect();
        if next == medoids {
            break;
        }
        medoids = next;
    }
    medoids.sort_unstable();
    medoids
}

/// An even choice of at most `most` of `count` things: the same ones every time.
pub fn subsample(count: usize, most: usize) -> Vec<usize> {
    let taken = count.min(most);
    (0..taken).map(|index| index * count / taken).collect()
}

/// The medoid of all, then the farthest from those taken; ends early at copies.
fn start(distances: &Array2<f32>, wanted: usize) -> Vec<usize> {
    let all: Vec<usize> = (0..distances.nrows()).collect();
    let first = central(distances, &all);
    let mut medoids = vec![first];
    let mut nearest = distances.row(first).to_vec();
    while medoids.len() < wanted {
        // The first of equals: `max_by` would yield the last.
        let farthest = all.iter().copied().rev().max_by(|a, b| nearest[*a].total_cmp(&nearest[*b]));
        let Some(farthest) = farthest.filter(|row| nearest[*row] > SAME) else { break };
        medoids.push(farthest);
        for (near, distance) in nearest.iter_mut().zip(distances.row(farthest)) {
            *near = near.min(*distance);
        }
    }
    medoids
}

/// Each row with its nearest medoid, the first of equals; a medoid is always with itself, so no
/// group is empty.
fn assign(distances: &Array2<f32>, medoids: &[usize]) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = medoids.iter().map(|medoid| vec![*medoid]).collect();
    for row in 0..distances.nrows() {
        if medoids.contains(&row) {
            continue;
        }
        let near = (0..medoids.len()).min_by(|a, b| {
            let distance = |group: &usize| distances[[row, medoids[*group]]];
            distance(a).total_cmp(&distance(b))
        });
        if let Some(group) = near.and_then(|near| groups.get_mut(near)) {
            group.push(row);
        }
    }
    groups
}

/// The member with the smallest sum of distances; of equals the first row.
fn central(distances: &Array2<f32>, group: &[usize]) -> usize {
    let cost = |row: usize| -> f64 {
        let row = distances.row(row);
        group.iter().map(|other| f64::from(row[*other])).sum()
    };
    let costs = group.iter().map(|row| (cost(*row), *row));
    let best = costs.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    best.map_or(0, |(_, row)| row)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::normalise;

    /// Unit vectors in a plane, by their angles in degrees.
    fn angles(degrees: &[f32]) -> Array2<f32> {
        Array2::from_shape_fn((degrees.len(), 2), |(row, axis)| {
            let (sin, cos) = degrees[row].to_radians().sin_cos();
            [cos, sin][axis]
        })
    }

    fn cost(rows: &Array2<f32>, medoids: &[usize]) -> f32 {
        rows.dot(&rows.t())
            .rows()
            .into_iter()
            .map(|row| medoids.iter().map(|m| 1.0 - row[*m]).fold(f32::INFINITY, f32::min))
            .sum()
    }

    #[test]
    fn each_group_is_represented_by_its_middle() {
        // Three groups; each one's middle is written first, second or last.
        let rows = angles(&[0.0, -5.0, 5.0, 85.0, 90.0, 95.0, 170.0, 190.0, 180.0]);
        assert_eq!(medoids(rows.view(), 3), [0, 4, 8]);
        assert_eq!(medoids(rows.view(), 9), (0..9).collect::<Vec<_>>());
        assert_eq!(medoids(rows.view(), 10), (0..9).collect::<Vec<_>>());
        assert_eq!(medoids(rows.view(), 0), [0; 0]);
        assert_eq!(medoids(angles(&[]).view(), 3), [0; 0]);
    }

    #[test]
    fn one_medoid_is_the_best_single_image() {
        let rows = angles(&[40.0, 0.0, 10.0, 20.0, 90.0]);
        let best = (0..5).min_by(|a, b| cost(&rows, &[*a]).total_cmp(&cost(&rows, &[*b])));
        assert_eq!(medoids(rows.view(), 1), [best.unwrap()]);
    }

    #[test]
    fn copies_do_not_take_the_places_of_others() {
        let rows = angles(&[10.0, 10.0, 10.0, 10.0, 50.0, 50.0]);
        assert_eq!(medoids(rows.view(), 3), [0, 4]);
        assert_eq!(medoids(angles(&[7.0; 5]).view(), 2), [0]);
    }

    #[test]
    fn it_is_no_worse_than_its_start_and_finds_well_parted_groups() {
        for seed in 0..20 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (groups, dim) = (4, 16);
            let centres = Array2::from_shape_fn((groups, dim), |_| random.f32() - 0.5);
            let mut rows = Array2::from_shape_fn((80, dim), |(row, axis)| {
                centres[[row % groups, axis]] + 0.05 * (random.f32() - 0.5)
            });
            rows.rows_mut().into_iter().for_each(|row| assert!(normalise(row)));
            let found = medoids(rows.view(), groups);
            let mut kinds: Vec<usize> = found.iter().map(|row| row % groups).collect();
            kinds.sort_unstable();
            assert_eq!(kinds, [0, 1, 2, 3], "seed {seed}");
            let distances = rows.dot(&rows.t()).mapv(|cosine| 1.0 - cosine);
            assert!(cost(&rows, &found) <= cost(&rows, &start(&distances, groups)) + 1e-4);
            assert_eq!(found, medoids(rows.view(), groups));
        }
    }

    #[test]
    fn a_subsample_is_even_and_has_no_doubles() {
        assert_eq!(subsample(3, 5), [0, 1, 2]);
        assert_eq!(subsample(10, 4), [0, 2, 5, 7]);
        assert_eq!(subsample(0, 4), [0; 0]);
        let taken = subsample(10_000, MAX_IMAGES);
        assert_eq!(taken.len(), MAX_IMAGES);
        assert!(taken.windows(2).all(|pair| pair[0] < pair[1]) && taken[MAX_IMAGES - 1] < 10_000);
    }
}
