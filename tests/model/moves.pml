/* Written by `python -m tests.model.moves` from core/whimbrel/migration/handover.py: not to be edited. */

#define S_OWNER 1
#define S_FROZEN 2
#define S_PREPARED 3
#define S_RELEASED 4
#define S_DONE 5

#define D_LOADING 1
#define D_PREPARED 2
#define D_OWNER 3
#define D_REFUSED 4

#define STOPPED 1
#define THAWED 2
#define PROVED 3
#define LET_GO 4
#define RUNNING 5
#define REFUSE 6
#define LOADED 7
#define FAILED 8
#define ORDERED 9
#define ABORTED 10
#define UNPROVED 11
#define WITNESS 12
#define CRASHED 13
#define OPERATOR 14

#define S_MOVES(old, new, why) (0 \
  || ((old) == S_OWNER && (new) == S_FROZEN && (why) == STOPPED) \
  || ((old) == S_FROZEN && (new) == S_OWNER && (why) == THAWED) \
  || ((old) == S_FROZEN && (new) == S_PREPARED && (why) == PROVED) \
  || ((old) == S_FROZEN && (new) == S_RELEASED && (why) == LET_GO) \
  || ((old) == S_FROZEN && (new) == S_RELEASED && (why) == CRASHED) \
  || ((old) == S_PREPARED && (new) == S_OWNER && (why) == THAWED) \
  || ((old) == S_PREPARED && (new) == S_RELEASED && (why) == LET_GO) \
  || ((old) == S_PREPARED && (new) == S_RELEASED && (why) == CRASHED) \
  || ((old) == S_RELEASED && (new) == S_DONE && (why) == RUNNING) \
  || ((old) == S_RELEASED && (new) == S_DONE && (why) == WITNESS) \
  || ((old) == S_RELEASED && (new) == S_OWNER && (why) == REFUSE) \
  || ((old) == S_RELEASED && (new) == S_OWNER && (why) == WITNESS) \
  || ((old) == S_RELEASED && (new) == S_OWNER && (why) == OPERATOR) \
  || ((old) == S_DONE && (new) == S_OWNER && (why) == OPERATOR) \
  )

#define D_MOVES(old, new, why) (0 \
  || ((old) == D_LOADING && (new) == D_PREPARED && (why) == LOADED) \
  || ((old) == D_LOADING && (new) == D_REFUSED && (why) == FAILED) \
  || ((old) == D_LOADING && (new) == D_REFUSED && (why) == CRASHED) \
  || ((old) == D_PREPARED && (new) == D_OWNER && (why) == ORDERED) \
  || ((old) == D_PREPARED && (new) == D_OWNER && (why) == UNPROVED) \
  || ((old) == D_PREPARED && (new) == D_OWNER && (why) == WITNESS) \
  || ((old) == D_PREPARED && (new) == D_OWNER && (why) == OPERATOR) \
  || ((old) == D_PREPARED && (new) == D_REFUSED && (why) == FAILED) \
  || ((old) == D_PREPARED && (new) == D_REFUSED && (why) == ABORTED) \
  || ((old) == D_PREPARED && (new) == D_REFUSED && (why) == WITNESS) \
  || ((old) == D_PREPARED && (new) == D_REFUSED && (why) == CRASHED) \
  || ((old) == D_PREPARED && (new) == D_REFUSED && (why) == OPERATOR) \
  )

/* Each move that was taken is counted beside the state, and told at the end: side, old, new, why. */
c_decl {
  static unsigned char took[2][8][8][32];
  static void tell(void) {
    int i, j, k, l;
    for (i = 0; i < 2; i++) for (j = 0; j < 8; j++) for (k = 0; k < 8; k++) for (l = 0; l < 32; l++)
      if (took[i][j][k][l]) printf("took %d %d %d %d\n", i, j, k, l);
  }
  static void take(int side, int old, int new, int why) {
    static int first = 1;
    if (first) { first = 0; atexit(tell); }
    took[side][old][new][why] = 1;
  }
}
byte mv = 0;
#define s_move(to, why) \
  mv = s; assert(S_MOVES(mv, to, why)); c_code { take(0, now.mv, to, why); }; mv = 0; s = to
#define d_move(m, to, why) \
  mv = d[m]; assert(D_MOVES(mv, to, why)); c_code { take(1, now.mv, to, why); }; mv = 0; d[m] = to
