/* The handover of a machine, as core/whimbrel/migration does it: a source, a destination for each attempt, and a network.

   The moves of ownership are those of `whimbrel.migration.handover`, out of which `moves.pml` is written: every change of
   `s` and `d` goes through `s_move` and `d_move`, which assert that the table has it and count that it was taken.

   Each attempt has a destination of its own. That one process takes several attempts, one behind the other, is a part of
   that; here an old one may still stand there, prepared, while a new one is under way.

   The network: an attempt's stream is in order and breaks once, for each side when it notices. A word over a connection
   of its own is said for good: it may be heard late, again, behind any other, or never, and only while the link is up. So
   connections that are cut, repaired, made again and overtaken are all in it.

   A crash takes a process's memory and leaves what its journal has. Records that were only noted may be in it or not; one
   that is torn is one that is not there. Time-outs have no clock: they may pass whenever they are waited for.

   -DDEAL=PAIRWISE|PROOF|ONE_WAY|WITNESS  -DATTEMPTS=n  -DCRASHES=n  -DCUTS=n  -DFAULT=n (see model.py)
   -DFORGETS: destinations keep their journal in memory. */

#define PAIRWISE 1
#define PROOF 2
#define ONE_WAY 3
#define WITNESS_CELL 4

#ifndef DEAL
#define DEAL PAIRWISE
#endif
#ifndef ATTEMPTS
#define ATTEMPTS 2
#endif
#ifndef CRASHES
#define CRASHES 1
#endif
#ifndef CUTS
#define CUTS 1
#endif
#ifndef FAULT
#define FAULT 0
#endif
#define N (ATTEMPTS + 1) /* attempts count from 1, as their ids; 0 is none */

#include "moves.pml"

/* How far an attempt's stream is written. */
#define NOTHING 0
#define ATTEMPT 1 /* which attempt it is, and its epoch */
#define DIGEST 2  /* everything, what it amounts to, and PING */
#define END 3     /* EOF */

/* An order to a prepared destination; the first counts. */
#define COMMIT 1
#define ABORT 2

/* Who wrote a cell of the witness. */
#define SOURCE 1
#define DESTINATION 2

/* The source: one machine, whose process may end and begin again. */
byte s = S_OWNER;
byte sj = S_OWNER;      /* what its journal says durably */
byte a = 0;             /* the attempt */
byte s_epoch = 1;
bit s_run = 1, s_img = 1; /* the guest runs; this process holds it */
bit s_open = 0;         /* the attempt goes on */
bit s_up = 0;           /* its stream, as the source sees it */
bit s_synced = 0;       /* FROZEN is durable */
bit s_asked = 0;        /* for the proof */
bit s_undecided = 0;    /* waits for an operator */
bit owes[N];            /* ABORT has to be said */

/* The destinations. */
byte d[N] = D_LOADING;
byte dj[N] = 0;         /* what the journal says; 0 is no record of the attempt */
bit d_begun[N], d_up[N], d_img[N], d_run[N];
bit d_down[N];          /* its process has ended, and has not begun again */
byte d_epoch[N];
byte order[N];
byte cell[N];           /* of the witness */
bit claimed[N];         /* the destination has read that it won */

/* The network. */
bit link = 1;
byte cuts = 0, crashes = 0;
byte sent[N];           /* of the stream */
bit pong[N];
bit commit[N], abort_[N];                     /* words of the source */
bit running[N], refuse[N], unknown[N];        /* and answers */

/* What really is, which nobody in the model reads but the assertions. */
bit taken_back[N];      /* the source has gone on, or will, behind this image */
bit past[N];            /* it has run behind this image */
bit ran = 0;            /* a destination has run */
bit lost = 0;           /* a crash took the only copy that might have run */
byte i = 0;

/* ------------------------------------------------------------------------------------------- the law */

inline source_runs() {
  i = 1;
  do
  :: i < N -> assert(!d_run[i]); past[i] = (past[i] || i <= a); taken_back[i] = (taken_back[i] || i <= a); i++
  :: else -> break
  od;
  i = 0;
  assert(!ran);  /* I2: the image here is dead once a destination has run */
  s_run = 1
}

inline destination_runs(m) {
  assert(!s_run);                       /* I1 */
  i = 1;
  do
  :: i < N -> assert(!d_run[i]); i++
  :: else -> break
  od;
  i = 0;
  assert(!past[m]);                     /* I2, the other way round */
  assert(!taken_back[m]);
  assert(d_epoch[m] > s_epoch);
  d_run[m] = 1;
  ran = 1
}

/* ---------------------------------------------------------------------------------------- the source */

#if FAULT == 13
#define s_writes(x) skip                /* no journal */
#else
#define s_writes(x) sj = x
#endif

#if DEAL == PAIRWISE || DEAL == PROOF
#define RELEASABLE S_PREPARED
#define WHOLE DIGEST                    /* how much of the stream a destination must have */
#else
#define RELEASABLE S_FROZEN             /* nothing is proved */
#define WHOLE END
#endif

proctype Source() {
end:
  do
  /* A new attempt. The last one, if it has not frozen the guest, is given up. */
  :: atomic { link && s_run && a < ATTEMPTS ->
       a++; s_open = 1; s_up = 1; s_asked = 0; sent[a] = ATTEMPT; d_epoch[a] = s_epoch + 1;
#if FAULT == 9
       i = 1; do :: i < N -> cell[i] = 0; i++ :: else -> break od; i = 0;
#endif
     }
  :: atomic { s_run && s_open && s_up ->
       s_run = 0; s_move(S_FROZEN, STOPPED); s_synced = 0 }
  :: atomic { s == S_FROZEN && s_img && !s_synced -> s_synced = 1; s_writes(S_FROZEN) } /* beside the sending */
#if DEAL == PAIRWISE
  :: atomic { s == S_FROZEN && s_up && !s_asked && s_synced -> s_asked = 1; sent[a] = DIGEST }
#elif DEAL == PROOF
  :: atomic { s == S_FROZEN && s_up && !s_asked -> s_asked = 1; sent[a] = DIGEST }
#endif
  :: atomic { s == S_FROZEN && pong[a] && s_up -> s_move(S_PREPARED, PROVED) }
  /* A time-out, a cancel or an error, all alike. */
  :: atomic { (s == S_FROZEN || s == S_PREPARED) && s_img ->
       s_move(S_OWNER, THAWED);
#if FAULT != 6
       s_writes(S_OWNER);
#endif
       s_up = 0; s_open = 0; taken_back[a] = 1; owes[a] = (s_asked && DEAL == PAIRWISE) }
  :: atomic { s == S_OWNER && s_img && !s_run -> source_runs() }
  :: atomic { s == RELEASABLE && s_img ->
       s_move(S_RELEASED, LET_GO);
#if FAULT != 1
       s_writes(S_RELEASED)
#endif
     }
  :: atomic { s == S_RELEASED && s_img && s_up && sent[a] < END -> sent[a] = END }
#if DEAL == PAIRWISE
  :: atomic { s == S_RELEASED && link && !commit[a] && (!s_up || sent[a] == END) && !s_undecided -> commit[a] = 1; s_up = 0 }
  :: atomic { link && owes[1] && !abort_[1] -> abort_[1] = 1 }
#if ATTEMPTS > 1
  :: atomic { link && owes[2] && !abort_[2] -> abort_[2] = 1 }
#endif
#if ATTEMPTS > 2
  :: atomic { link && owes[3] && !abort_[3] -> abort_[3] = 1 }
#endif
#endif
  /* The answers; over the stream, or to a word. */
  :: atomic { s == S_RELEASED && running[a] && (s_up || (DEAL == PAIRWISE && link)) && !s_undecided ->
       s_move(S_DONE, RUNNING); s_writes(S_DONE); s_img = 0; s_up = 0 }
#if DEAL == PAIRWISE
  :: atomic { s == S_RELEASED && refuse[a] && (s_up || link) && !s_undecided ->
       s_move(S_OWNER, REFUSE);
#if FAULT != 12
       s_epoch = s_epoch + 2;
#endif
       assert(s_epoch > d_epoch[a]);
       s_writes(S_OWNER); taken_back[a] = 1; s_up = 0; s_open = 0 }
  :: atomic { s == S_RELEASED && unknown[a] && link && !s_undecided ->
#if FAULT == 7
       s_move(S_OWNER, REFUSE); s_writes(S_OWNER); s_open = 0 }
#else
       s_undecided = 1 }
#endif
#elif DEAL == WITNESS_CELL
  :: atomic { s == S_RELEASED ->
       if
#if FAULT == 16
       :: true -> s_move(S_OWNER, WITNESS); s_writes(S_OWNER); taken_back[a] = 1; s_open = 0; s_epoch = s_epoch + 2
#else
       :: cell[a] != DESTINATION -> cell[a] = SOURCE; s_move(S_OWNER, WITNESS); s_writes(S_OWNER);
            taken_back[a] = 1; s_open = 0; s_epoch = s_epoch + 2
#endif
       :: cell[a] == DESTINATION -> s_move(S_DONE, WITNESS); s_writes(S_DONE); s_img = 0
       fi;
       s_up = 0 }
#else
  /* The stream is all there is; behind its end nobody here can know. */
  :: atomic { s == S_RELEASED && !s_undecided && (!s_up || sent[a] == END) -> s_undecided = 1; s_up = 0 }
#endif
#if FAULT == 2
  :: atomic { s == S_RELEASED && s_img -> s_move(S_OWNER, REFUSE); s_writes(S_OWNER); s_epoch = s_epoch + 2; s_open = 0 }
#endif
  :: atomic { s_up -> s_up = 0; if :: s == S_OWNER -> s_open = 0 :: else -> skip fi } /* the stream is broken */

  /* A crash, and what `standing` makes of the journal. */
  :: atomic { crashes < CRASHES && s != S_DONE && s_img ->
       crashes++;
       if :: s == S_FROZEN -> s_writes(S_FROZEN) :: true -> skip fi; /* what was noted may be there */
       if :: s == S_PREPARED -> s_writes(S_PREPARED) :: true -> skip fi;
       s = sj; s_run = 0; s_img = 0; s_up = 0; s_open = 0; s_undecided = 0;
       i = 1; do :: i < N -> owes[i] = 0; i++ :: else -> break od; i = 0 }
  :: atomic { !s_img && (s == S_FROZEN || s == S_PREPARED) ->
#if DEAL == PAIRWISE
       s_move(S_RELEASED, CRASHED); s_writes(S_RELEASED)
#else
       s = S_OWNER; s_writes(S_OWNER)             /* lost: a record of the machine's, of no attempt */
#endif
     }
  :: atomic { !s_img && s == S_OWNER -> s_img = 1; s_epoch++; source_runs() } /* afresh */
#if FAULT == 15
  :: atomic { !s_img && s == S_RELEASED -> s = S_OWNER; s_writes(S_OWNER) }
#endif
  od
}

/* ---------------------------------------------------------------------------------- the destinations */

#define d_writes(m, x) dj[m] = x
#define d_answers(m) (link && !d_down[m])

proctype Destination(byte m) {
end:
  do
  :: atomic { !d_begun[m] && sent[m] >= ATTEMPT && !d_down[m] ->
       d_begun[m] = 1; d_up[m] = 1;
#if FAULT != 8
       if :: DEAL == PAIRWISE -> dj[m] = D_LOADING :: else -> skip fi
#endif
     }
  /* Everything is here. Noted only: behind a crash it is the same as loading. */
  :: atomic { d_begun[m] && !d_down[m] && d[m] == D_LOADING && d_up[m] && sent[m] >= WHOLE ->
       if
       :: d_move(m, D_PREPARED, LOADED); d_img[m] = 1; pong[m] = 1
       :: d_move(m, D_REFUSED, FAILED); d_writes(m, D_REFUSED); d_up[m] = 0;
       fi }
  :: atomic { d_begun[m] && !d_down[m] && d_up[m] -> d_up[m] = 0;       /* the stream is broken */
       if
       :: d[m] == D_LOADING -> d_move(m, D_REFUSED, FAILED); d_writes(m, D_REFUSED)
#if DEAL == PROOF
       :: d[m] == D_PREPARED -> d_move(m, D_REFUSED, CRASHED); d_img[m] = 0 /* a QEMU ends; a whimbrel keeps it */
       :: d[m] == D_PREPARED -> skip
#endif
       :: else -> skip
       fi }
#if DEAL == PAIRWISE || DEAL == PROOF
  /* EOF is an order like the others. */
  :: atomic { !d_down[m] && d[m] == D_PREPARED && d_up[m] && sent[m] == END && order[m] == 0 -> order[m] = COMMIT }
#endif
#if DEAL == PAIRWISE
#if FAULT == 10
  :: atomic { link && !d_down[m] && d[m] == D_PREPARED && (commit[m] || commit[m - 1]) && order[m] == 0 -> order[m] = COMMIT }
#else
  :: atomic { link && !d_down[m] && d[m] == D_PREPARED && commit[m] && order[m] == 0 -> order[m] = COMMIT }
#endif
#if FAULT == 11
  :: atomic { link && !d_down[m] && d[m] == D_PREPARED && (abort_[m] || abort_[m - 1]) && order[m] == 0 -> order[m] = ABORT }
#else
  :: atomic { link && !d_down[m] && d[m] == D_PREPARED && abort_[m] && order[m] == 0 -> order[m] = ABORT }
#endif
  :: atomic { link && !d_down[m] && d_begun[m] && d[m] == D_LOADING && (commit[m] || abort_[m]) ->
       d_up[m] = 0; d_move(m, D_REFUSED, FAILED); d_writes(m, D_REFUSED) }
  :: atomic { !d_down[m] && d[m] == D_PREPARED && order[m] == ABORT ->
       assert(taken_back[m]);
       d_move(m, D_REFUSED, ABORTED); d_writes(m, D_REFUSED); d_img[m] = 0; d_up[m] = 0 }
  /* What was asked is answered: from what it holds, or from the records. */
  :: atomic { link && !d_down[m] && (commit[m] || sent[m] == END) && d[m] == D_OWNER && !running[m] ->
       running[m] = 1 }
#if FAULT == 4
  :: atomic { link && !d_down[m] && commit[m] && d[m] == D_OWNER && !refuse[m] -> refuse[m] = 1 }
#endif
  :: atomic { link && !d_down[m] && (commit[m] || sent[m] == END) && d[m] == D_REFUSED && dj[m] != 0 && !refuse[m] ->
       refuse[m] = 1 }
  :: atomic { link && !d_down[m] && commit[m] && dj[m] == 0 && (!d_begun[m] || d[m] == D_REFUSED) && !unknown[m] ->
       unknown[m] = 1 }
#if FAULT == 5
  :: atomic { link && !d_down[m] && commit[m] && d[m] == D_REFUSED && d_img[m] -> d[m] = D_OWNER; dj[m] = D_OWNER }
#endif
#endif
#if DEAL == PAIRWISE || DEAL == PROOF
  :: atomic { !d_down[m] && d[m] == D_PREPARED && order[m] == COMMIT ->
       if
       :: d_move(m, D_OWNER, ORDERED);
#if FAULT != 17
          d_writes(m, D_OWNER)
#else
          dj[m] = D_PREPARED
#endif
#if DEAL == PAIRWISE
       :: d_move(m, D_REFUSED, FAILED); d_writes(m, D_REFUSED); d_up[m] = 0;  /* its drives are not free */
#if FAULT != 5
          d_img[m] = 0
#endif
#endif
       fi }
#elif DEAL == ONE_WAY
  :: atomic { !d_down[m] && d[m] == D_PREPARED -> d_move(m, D_OWNER, UNPROVED); d_writes(m, D_OWNER) }
#else
  /* First the cell, then the journal. */
  :: atomic { !d_down[m] && d[m] == D_PREPARED && !claimed[m] ->
       if
       :: cell[m] != SOURCE -> cell[m] = DESTINATION; claimed[m] = 1
       :: cell[m] == SOURCE -> d_move(m, D_REFUSED, WITNESS); d_writes(m, D_REFUSED); d_img[m] = 0
       fi }
#if FAULT == 14
  :: atomic { !d_down[m] && d[m] == D_PREPARED -> d_move(m, D_OWNER, WITNESS); d_writes(m, D_OWNER) }
#else
  :: atomic { !d_down[m] && d[m] == D_PREPARED && claimed[m] -> d_move(m, D_OWNER, WITNESS); d_writes(m, D_OWNER) }
#endif
#endif
#if FAULT == 3
  :: atomic { !d_down[m] && d[m] == D_PREPARED && !d_up[m] -> d_move(m, D_OWNER, ORDERED); d_writes(m, D_OWNER) }
#endif
  :: atomic { !d_down[m] && d[m] == D_OWNER && d_img[m] && !d_run[m] -> destination_runs(m) }
#if DEAL != PAIRWISE
  :: atomic { !d_down[m] && d[m] == D_OWNER && d_run[m] && !running[m] && DEAL != ONE_WAY && (d_up[m] || DEAL == WITNESS_CELL) ->
       running[m] = 1 }
#endif
  :: atomic { crashes < CRASHES && d_begun[m] && !d_down[m] && d[m] != D_REFUSED && !(d[m] == D_OWNER && !d_img[m]) ->
       crashes++; d_down[m] = 1; d_up[m] = 0; d_img[m] = 0; order[m] = 0;
       lost = (lost || d_run[m] || d[m] == D_OWNER || claimed[m]); d_run[m] = 0 }
  /* Its next process: the image is gone, and what the journal has of the attempt is what it answers. */
  :: atomic { d_down[m] ->
       d_down[m] = 0;
#ifdef FORGETS
       dj[m] = 0;
#endif
       if
#if DEAL == WITNESS_CELL
       /* It asks: a cell that is free goes to the source. */
       :: d[m] == D_LOADING -> d_move(m, D_REFUSED, CRASHED)
       :: d[m] == D_PREPARED && cell[m] != DESTINATION -> cell[m] = SOURCE; d_move(m, D_REFUSED, WITNESS)
       :: d[m] == D_PREPARED && cell[m] == DESTINATION -> d_move(m, D_OWNER, WITNESS); d_writes(m, D_OWNER)
#else
       :: d[m] == D_LOADING || d[m] == D_PREPARED -> d_move(m, D_REFUSED, CRASHED)
#endif
       :: d[m] == D_OWNER && dj[m] != D_OWNER -> d[m] = D_REFUSED
       :: else -> skip
       fi }
  od
}

/* ------------------------------------------------------------------------------------------- the rest */

proctype Network() {
end:
  do
  :: atomic { link && cuts < CUTS -> link = 0; cuts++ }
  :: atomic { !link -> link = 1 }
  od
}

/* Nothing can happen any more, the link is whole, and every process is up: then somebody runs, or a crash has taken the
   last copy, or the deal is one that says that an operator must decide. */
proctype Judge() {
  bit held = 0, runs = 0;
  timeout;
  i = 1;
  do
  :: i < N -> held = (held || (d_img[i] && !past[i])); runs = (runs || d_run[i]); i++
  :: else -> break
  od;
  assert(link);
  assert(s_run || runs || lost || (crashes > 0 && !s_img && !held) || s_undecided);
#if DEAL == PAIRWISE && !defined(FORGETS)
  assert(!s_undecided || !s_img);
#elif DEAL == WITNESS_CELL
  assert(!s_undecided)
#endif
}

init {
  atomic {
    run Source();
    i = 1;
    do
    :: i < N -> run Destination(i); i++
    :: else -> break
    od;
    i = 0;
    run Network();
    run Judge()
  }
}
