"""Questions about a run that are worth a name."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class NamedQuery:
    """A question and its SQL over the views of a run."""

    answers: str
    sql: str


_SAMPLE = 'rank, round(score, 5) AS score, domain, tokens, round(loss / loss_tokens, 3) AS nats_per_token, path, row, "window", preview'

NAMED_QUERIES: dict[str, NamedQuery] = {
    "lineage": NamedQuery(
        "what every finished stage was made from, and whether that still stands",
        "SELECT stage, name, input, made_by, fingerprint FROM inputs",
    ),
    "domains-before-after": NamedQuery(
        "share of every domain in the candidates and in each selection",
        """
        SELECT selection, domain, count(*) AS candidates,
            round(count(*) / sum(count(*)) OVER (PARTITION BY selection), 4) AS share_before,
            count(*) FILTER (selected) AS selected,
            round(count(*) FILTER (selected) / sum(count(*) FILTER (selected)) OVER (PARTITION BY selection), 4) AS share_after,
            sum(tokens) FILTER (selected) AS selected_tokens
        FROM selections GROUP BY selection, domain ORDER BY selection, selected DESC, candidates DESC, domain""",
    ),
    "top-samples": NamedQuery(
        "the 20 best samples of each selection",
        f"SELECT selection, {_SAMPLE} FROM selections WHERE rank < 20 ORDER BY selection, rank",
    ),
    "worst-samples": NamedQuery(
        "the 20 candidates that each selector scored lowest",
        f"""
        SELECT selection, {_SAMPLE} FROM selections WHERE score IS NOT NULL
        QUALIFY row_number() OVER (PARTITION BY selection ORDER BY score, sample_id) <= 20
        ORDER BY selection, score, sample_id""",
    ),
    "reasons": NamedQuery(
        "why candidates were taken or left, per selection",
        """
        SELECT selection, split_part(reason, ' ', 1) AS reason, count(*) AS samples, sum(tokens) AS tokens
        FROM selections GROUP BY selection, split_part(reason, ' ', 1) ORDER BY selection, samples DESC, reason""",
    ),
    "budget-spent": NamedQuery(
        "samples and tokens that each selection spends, and what they weigh",
        """
        SELECT selection, count(*) AS candidates, count(*) FILTER (selected) AS samples,
            sum(tokens) FILTER (selected) AS tokens, sum(loss_tokens) FILTER (selected) AS loss_tokens,
            round(sum(selection_weight), 3) AS weight_sum,
            round(sum(selection_weight) ^ 2 / sum(selection_weight ^ 2), 1) AS effective_samples
        FROM selections GROUP BY selection ORDER BY selection""",
    ),
    "score-distribution": NamedQuery(
        "quantiles of each selection's score, over candidates and over the selected",
        """
        SELECT selection, selected, count(*) AS samples, min(score) AS least, quantile_cont(score, 0.05) AS p05,
            quantile_cont(score, 0.5) AS median, quantile_cont(score, 0.95) AS p95, max(score) AS greatest
        FROM selections WHERE score IS NOT NULL GROUP BY selection, selected ORDER BY selection, selected DESC""",
    ),
    "rejects-by-reason": NamedQuery(
        "how many rows and windows could not be scored, by reason, with one example",
        """
        SELECT scoring, stage, reason, count(*) AS windows, count(DISTINCT (path, row)) AS rows,
            min_by(path || ':' || row, (path, row, "window")) AS example, min_by(detail, (path, row, "window")) AS detail
        FROM rejects GROUP BY scoring, stage, reason ORDER BY scoring, windows DESC, stage, reason""",
    ),
    "duplicates": NamedQuery(
        "texts that stand more than once in the corpus",
        """
        SELECT scoring, content_id, count(*) AS copies, min_by(path || ':' || row, (path, row, "window")) AS first,
            string_agg(DISTINCT domain, ', ') AS domains, min_by(preview, (path, row, "window")) AS preview
        FROM features GROUP BY scoring, content_id HAVING count(*) > 1 ORDER BY scoring, copies DESC, content_id""",
    ),
    "overlap": NamedQuery(
        "samples that overlap the target or the held-out set",
        """
        SELECT c.target, c.scoring, round(c.overlap, 3) AS overlap, c.overlap_with, c.overlapping, f.path, f.row, f."window", f.preview
        FROM curvature c JOIN features f USING (scoring, sample_id)
        WHERE c.overlapping OR c.overlap > 0.1 ORDER BY c.target, c.scoring, c.overlap DESC, c.sample_id""",
    ),
    "stiff-vs-alignment": NamedQuery(
        "how the selected differ from the left in alignment, stiff cost and energies",
        """
        SELECT selection, selected, count(*) AS samples, avg(alignment) AS alignment, avg(stiff_cost) AS stiff_cost,
            avg(flat_energy) AS flat_energy, avg(null_energy) AS null_energy,
            corr(alignment, stiff_cost) AS correlation_alignment_stiff
        FROM selections GROUP BY selection, selected ORDER BY selection, selected DESC""",
    ),
    "spectrum": NamedQuery(
        "the spectrum of every target: stiff and flat directions, their energy and their share of the mean target gradient",
        """
        SELECT target, scoring, fisher, part, count(*) AS directions, max(eigenvalue) AS greatest, min(eigenvalue) AS least,
            sum(eigenvalue) / sum(sum(eigenvalue)) OVER (PARTITION BY target, scoring, fisher) AS energy,
            sum(mean_share) AS mean_share
        FROM spectrum GROUP BY target, scoring, fisher, part ORDER BY target, scoring, fisher, greatest DESC""",
    ),
    "diagnostics": NamedQuery(
        "certificates, diagnostics and counts of every selection",
        """
        SELECT selection, section, key, text AS value FROM solutions
        WHERE section IN ('certificate', 'diagnostics', 'counts', 'warnings') ORDER BY selection, section, key""",
    ),
    "overlap-of-selections": NamedQuery(
        "how many samples every two selections share",
        """
        SELECT a.selection AS selection, b.selection AS other, count(*) AS shared,
            round(count(*) / least(
                (SELECT count(*) FROM selections s WHERE s.selection = a.selection AND s.selected),
                (SELECT count(*) FROM selections s WHERE s.selection = b.selection AND s.selected)), 4) AS share_of_smaller
        FROM selections a JOIN selections b ON a.sample_id = b.sample_id AND a.selection < b.selection
        WHERE a.selected AND b.selected GROUP BY a.selection, b.selection ORDER BY shared DESC, 1, 2""",
    ),
    "step-summary": NamedQuery(
        "first and last step of every training: losses, tokens, what was kept",
        """
        SELECT training, any_value(policy) AS policy, count(*) AS steps, sum(offered) AS offered, sum(kept) AS kept,
            max(total_trained_tokens) AS trained_tokens, max(total_offered_tokens) AS offered_tokens,
            arg_min(loss, step) AS first_loss, arg_max(loss, step) AS last_loss,
            arg_min(eval_loss, step) AS first_eval_loss, arg_max(eval_loss, step) AS last_eval_loss,
            count(*) FILTER (fallback <> '') AS fallbacks
        FROM steps GROUP BY training ORDER BY training""",
    ),
    "kept-by-domain-over-steps": NamedQuery(
        "how many offered samples of every domain each training kept, in tenths of the training",
        """
        WITH placed AS (
            SELECT d.training, d.sample_id, d.kept, d.step_weight,
                ntile(10) OVER (PARTITION BY d.training ORDER BY d.step, d.position) AS tenth
            FROM decisions d),
        domains AS (SELECT DISTINCT sample_id, domain FROM selections)
        SELECT training, tenth, domain, count(*) AS offered, count(*) FILTER (kept) AS kept,
            round(count(*) FILTER (kept) / count(*), 3) AS kept_share, round(avg(step_weight) FILTER (kept), 3) AS mean_weight
        FROM placed LEFT JOIN domains USING (sample_id)
        GROUP BY training, tenth, domain ORDER BY training, tenth, offered DESC, domain""",
    ),
    "decisions-by-reason": NamedQuery(
        "what trainings did with the samples they were offered, and why",
        """
        SELECT training, kept, reason, count(*) AS samples, sum(tokens) AS tokens, round(avg(step_weight), 4) AS mean_weight
        FROM decisions GROUP BY training, kept, reason ORDER BY training, samples DESC, reason""",
    ),
    "seconds": NamedQuery(
        "where the time of every training went",
        """
        SELECT training, process, host, count(*) AS steps, round(sum(seconds), 2) AS seconds,
            round(sum(cpu_seconds), 2) AS cpu_seconds, round(sum(selection_seconds) / sum(seconds), 3) AS selection_share,
            round(sum(flops) / 1e12, 3) AS tera_flop, round(sum(selection_flops) / sum(flops), 3) AS selection_flops_share,
            round(sum(mfu * seconds) / sum(seconds), 3) AS mfu, max(peak_memory) AS peak_memory
        FROM timings GROUP BY training, process, host ORDER BY training, process""",
    ),
}
